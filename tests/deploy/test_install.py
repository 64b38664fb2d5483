"""How `make` installs: uv looks for packages where pip is told to."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "install.py"


@pytest.fixture(scope="module")
def install():
    spec = importlib.util.spec_from_file_location("install", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_uv_is_told_where_pip_looks(install):
    listed = r"""
:env:.find-links='/wheels'
:env:.index-url='https://user:p%40ss@mirror/simple?a=b'
global.extra-index-url='https://one/simple\nhttps://two/simple'
global.find-links='/elsewhere'
global.no-cache-dir='false'
install.cert="/it's/mine.pem"
wheel.index-url='https://not/ours'
"""
    assert install.uv_settings(listed) == {
        "UV_DEFAULT_INDEX": "https://user:p%40ss@mirror/simple?a=b",
        "UV_INDEX": "https://one/simple https://two/simple",
        "UV_FIND_LINKS": "/wheels",
        "SSL_CERT_FILE": "/it's/mine.pem",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    assert install.uv_settings("global.find-links='/a /b'")["UV_FIND_LINKS"] == "/a,/b"


@pytest.mark.parametrize("fails", ["the download of uv", "uv"])
def test_where_uv_does_not_work_pip_installs(install, monkeypatch, fails):
    done = []

    def run(*words, environment=None):
        done.append(words)
        return not (words[-1] == "uv" if fails == "the download of uv" else words[1] == "uv")

    monkeypatch.setattr(install, "_run", run)
    assert install.main(["--editable", "."]) == 0
    assert done[-1] == ("-m", "pip", "install", "--quiet", "--editable", ".")
