"""What the tests of sources share: a way to prepare images, and to write them."""

from PIL import Image

from tapvit_jax.data.preprocess import Preprocess

RGB = Preprocess(6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def save(path, value=100, size=(6, 6), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value // 2, 0)).save(path, **options)
    return path
