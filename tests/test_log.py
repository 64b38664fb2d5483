"""No secret is said, whoever says it; and nothing that was read is ever unpickled."""

import ast
import json

import pytest
from places import ROOT, python

from pipeline.config import ConfigError, resolve_config
from pipeline.log import has_password, redact, redacted
from pipeline.sweep.ended import failed
from pipeline.sweep.settings import Setting, Trial

SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "MLFLOW_TRACKING_PASSWORD")
SECRETS += ("MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN", "PGPASSWORD", "HF_TOKEN", "SOME_API_KEY")


@pytest.mark.parametrize("name", [*SECRETS, "OIDC_CLIENT_SECRET"])
def test_values_of_secret_variables_are_hidden(monkeypatch, name):
    monkeypatch.setenv(name, "pa/ss+word/of/20/let")
    assert redact("login with pa/ss+word/of/20/let failed") == "login with *** failed"
    assert redact("?key=pa%2Fss%2Bword%2Fof%2F20%2Flet&x=1") == "?key=***&x=1"
    monkeypatch.setenv(name, "short")
    assert redact("a short word") == "a short word"


def test_a_key_id_that_is_a_word_hides_nothing_else(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "slotmatch")
    summary = {"uri": "s3://slotmatch/demo", "model": "models:/slotmatch/3", "slotmatch": 1}
    assert redacted(summary) == summary


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("can't connect to postgresql://me:hunter2@db:5432/mlflow", "hunter2"),
        ("http://me:hunt@er2@host/path", "hunt@er2"),
        ("http://:hunter2@host", "hunter2"),
        ("postgresql+psycopg2://mlflow:aB3/xY9+kk=@db/mlflow", "xY9"),
        ("GET https://b.s3.aws.com/k?X-Amz-Credential=AKIA1%2Fx&X-Amz-Signature=0a1b&y", "AKIA1"),
        ("GET https://b.s3.aws.com/k?X-Amz-Credential=AKIA1%2Fx&X-Amz-Signature=0a1b&y", "0a1b"),
        ("headers {'Authorization': 'Basic YTpi', 'Accept': '*'}", "YTpi"),
        ("Authorization: AWS4-HMAC-SHA256 Credential=AKIA1/x, Signature=0a1b", "0a1b"),
        ("postgresql://db/mlflow?user=me&password=hunter2", "hunter2"),
    ],
)
def test_secrets_in_urls_and_headers_are_hidden(text, secret):
    assert secret not in redact(text)
    assert "***" in redact(text)
    assert has_password(text)


NO_SECRETS = ("models:/slotmatch@champion", "http://127.0.0.1:5000/#/models", "s3://bucket/prefix")
NO_SECRETS += ("sqlite:////tmp/mlflow.db", "postgresql://me@db/mlflow", "42/400 videos, 11.2 videos/s")


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text
    assert not has_password(text)


@pytest.mark.parametrize(
    ("key", "value", "way_out"),
    [
        ("mlflow.tracking_uri", "http://me:hunter2@host:5000", "MLFLOW_TRACKING_PASSWORD"),
        ("mlflow.tracking_uri", "postgresql://me:hunter2@db/mlflow", "PGPASSWORD"),
        ("storage.root", "s3://key:hunter2@bucket/prefix", "AWS_SECRET_ACCESS_KEY"),
        ("dataset.path", "s3://key:hunter2@bucket", "AWS_SECRET_ACCESS_KEY"),
        ("teacher.checkpoint", "https://me:hunter2@host/a.ckpt", "environment"),
        ("sweep.grid", "{teacher.checkpoint: ['https://me:hunter2@host/a.ckpt']}", "environment"),
    ],
)
def test_a_password_in_a_config_is_refused_by_its_key(key, value, way_out):
    with pytest.raises(ConfigError, match=key) as refused:
        resolve_config({}, [f"{key}={value}"])
    assert way_out in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_password_in_the_tracking_variable_is_refused(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@host")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI: holds a password"):
        resolve_config({})
    resolve_config({}, ["mlflow.tracking_uri=http://host"])


@pytest.mark.parametrize("key", ["mlflow.tracking_url", "distill.beta", "mlflow", "mlflow.tracking_uri.more"])
def test_errors_that_show_a_value_show_no_password(key):
    with pytest.raises(ConfigError) as refused:
        resolve_config({"mlflow": {"tracking_uri": "x"}}, [f"{key}=http://me:hunter2@host"])
    assert "hunter2" not in str(refused.value)


def test_records_of_failed_trials_hold_no_secret(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2!")
    trial = Trial(Setting("s", {}), 0, resolve_config({}))
    assert failed(trial, OSError("login hunter2! refused")).error == "OSError: login *** refused"


def test_a_job_that_fails_says_no_secret(tmp_path):
    """Its log, its traceback, what libraries log in it, and its summary."""
    code = (
        "import logging, sys\n"
        "from jobs._job import Job\n"
        "from jobs._main import run\n"
        "def work(config):\n"
        "    logging.getLogger('botocore').warning('signed %s', 'with hunter2!')\n"
        "    try:\n"
        "        raise OSError('inner hunter2!')\n"
        "    except OSError:\n"
        "        logging.getLogger('botocore').exception('failed')\n"
        "        raise RuntimeError('GET http://me:pass@host hunter2! failed')\n"
        "sys.exit(run(Job('test', 'fails', work, default_config='demo.yaml'), []))\n"
    )
    out, errors = python("-c", code, ends=1, AWS_SECRET_ACCESS_KEY="hunter2!", HOME=str(tmp_path))
    assert "Traceback" in errors
    assert "signed with ***" in errors
    assert json.loads(out)["error"] == "GET http://me:***@host *** failed"
    for secret in ("hunter2!", "me:pass@"):
        assert secret not in errors + out


def test_a_message_that_does_not_fit_its_arguments_does_not_end_a_job():
    python(
        "-c", "import logging; from pipeline.log import redact_output as r; r(); logging.warning('%d', 'x')"
    )


def _calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize(
    "file", sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("jobs/*.py")]), ids=lambda f: f.stem
)
def test_nothing_that_was_read_is_unpickled(file):
    for name, options in _calls(ast.parse(file.read_text())):
        if name == "torch.load":
            assert options.get("weights_only") == "True"
        if name.endswith(("np.load", "numpy.load", "read_array")):
            assert options.get("allow_pickle", "False") == "False"
        assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec")
        assert not name.startswith(("pickle.", "cloudpickle.", "joblib.", "dill.", "shelve.", "marshal."))
