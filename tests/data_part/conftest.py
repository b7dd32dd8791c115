import pytest

from tests.data_part.image_files import save


@pytest.fixture
def classes(tmp_path):
    """Three classes, one with a nested folder, and files that are not images."""
    save(tmp_path / "bee" / "2.png", 20)
    save(tmp_path / "bee" / "1.png", 10)
    save(tmp_path / "ant" / "deep" / "er" / "1.JPEG", 30)
    save(tmp_path / "cat" / "x.bmp", 40)
    save(tmp_path / "cat" / "y.webp", 50)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._y.png").write_text("left behind by macOS")
    (tmp_path / "README.md").write_text("hello")
    return tmp_path
