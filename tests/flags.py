"""XLA's flags for tests, apart from conftest: programs that tests start want one device each."""

from importlib.metadata import version

# Tests compile far more than they compute: with XLA's older emitter of loops, into one LLVM module,
# a program compiles in a third of the time. A jaxlib that no longer knows a flag ends at once, so
# that only the one that is known to know them gets them.
CHEAP = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if not version("jaxlib").startswith("0.10."):
    CHEAP = ""
