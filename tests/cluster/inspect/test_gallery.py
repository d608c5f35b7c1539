"""The gallery over HTTP: pictures are the student's, only who has the token sees them."""

import re
import threading
from contextlib import contextmanager
from html import unescape
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest

from cluster.inspect.gallery import PICTURES, Exhibit, Wish, server
from distill.config import ConfigError
from distill.report.figures import png_uri
from distill.run.files import RunDir
from distill.sample import load_student


@pytest.fixture(scope="module")
def exhibit(finished_run, data, teachers):
    return Exhibit(finished_run, data, teachers["tiny"])


@contextmanager
def served(*exhibits):
    bound, address = server(list(exhibits))
    thread = threading.Thread(target=bound.serve_forever, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        bound.shutdown()
        thread.join()
        bound.server_close()


@pytest.fixture(scope="module")
def address(exhibit):
    with served(exhibit) as found:
        yield found


def read(address: str) -> str:
    with urlopen(address, timeout=60) as answer:
        return answer.read().decode()


def test_the_page_has_the_pictures_that_the_student_draws(address, finished_run):
    page = read(f"{address}&seed=3&label=7&nfe=2")
    drawn = load_student(finished_run.root).sample(PICTURES, nfe=2, seed=3, labels=7)
    found = re.findall(r'src="(data:image/png;base64,[^"]+)"', page)
    assert len(found) == 3 * PICTURES
    assert found[PICTURES : 2 * PICTURES] == [png_uri(image) for image in drawn.numpy()]
    assert [unescape(row) for row in re.findall(r"<h3>([^<]+) <span", page)] == [
        "teacher, heun, 16 evaluations",
        "student, 2 evaluations",
        "teacher, euler, 2 evaluations",
    ]
    assert len(re.findall(r"[\d.e-]+ ms a picture", page)) == 3
    assert '<option value="7" selected>' in page and 'value="3"' in page


def test_it_listens_on_loopback_and_answers_who_has_the_token(address):
    assert address.startswith("http://127.0.0.1:")
    for wrong in (address.partition("?")[0], address[:-1], address + "x"):
        with pytest.raises(HTTPError) as refused:
            read(wrong)
        assert refused.value.code == 403
        assert "token" in refused.value.read().decode()


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("nfe=9", "nfe=9 must be between 1 and 8"),
        ("nfe=0", "nfe=0 must be between 1 and 8"),
        ("seed=fox", "seed=fox must be a whole number"),
        ("seed=-1", "seed=-1 must be at least 0"),
    ],
)
def test_a_wish_that_cannot_be_granted_is_a_sentence(address, query, sentence):
    with pytest.raises(HTTPError) as refused:
        read(f"{address}&{query}")
    assert (refused.value.code, refused.value.read().decode()) == (400, sentence)


def test_a_class_that_a_student_has_not_stands_where_its_pictures_would(exhibit):
    with served(exhibit, exhibit) as address:
        page = read(f"{address}&label=12")
    assert page.count("12 is not a class of this model") == 2 and "<img" not in page


def test_two_runs_stand_side_by_side_on_the_same_noise(exhibit):
    with served(exhibit, exhibit) as address:
        page = read(f"{address}&seed=5")
    found = re.findall(r'src="(data:[^"]+)"', page)
    assert page.count("<section>") == 2 and len(found) == 6 * PICTURES
    assert found[: 3 * PICTURES] == found[3 * PICTURES :]


def test_a_port_in_use_is_a_sentence(exhibit):
    bound, address = server([exhibit])
    with bound, pytest.raises(ConfigError, match="is taken by another program; name another"):
        server([exhibit], int(re.findall(r":(\d+)/", address)[0]))


def test_a_run_without_a_checkpoint(data, teachers, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        Exhibit(RunDir(tmp_path), data, teachers["tiny"])


def test_pictures_of_a_class_drawn_from_the_seed_are_those_of_sample(exhibit, finished_run):
    row = exhibit.rows(Wish(seed=1))[1]
    drawn = load_student(finished_run.root).sample(PICTURES, seed=1).numpy()
    assert row.images == [png_uri(image) for image in drawn] and row.seconds > 0
    assert not np.array_equal(drawn[0], drawn[1])
