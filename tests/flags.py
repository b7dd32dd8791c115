"""XLA's flags for tests, apart from conftest: programs that tests start want one device each."""

# Tests compile far more than they compute: with XLA's older emitter of loops, into one LLVM module,
# a program compiles in a third of the time. A jaxlib that no longer knows a flag says so and ends.
CHEAP = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
