"""Secrets of a run file: what is hidden, and that no text of ours shows it."""

import json
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.load import dump_run, load_run
from configs.secrets import hide_secrets, public_variables, uri_secrets, with_references, without_password
from launch.slurm.script import render_scripts


@pytest.mark.parametrize(
    ("uri", "public", "secrets"),
    [
        ("https://me:pw@host:5000/path?x=1", "https://host:5000/path?x=1", {"pw"}),
        ("https://me:p%40w@host", "https://host", {"p%40w", "p@w"}),
        ("https://me:a/b?c@d@host:5000/x", "https://host:5000/x", {"a/b?c@d"}),
        ("https://me:12/3456@host", "https://host", {"12/3456", "3456"}),
        ("https://token@host/x", "https://host/x", {"token"}),
        ("HTTPS://me:pw@host#pw", "HTTPS://host", {"pw"}),
        ("http://me:pw@[::1]:5000", "http://[::1]:5000", {"pw"}),
        ("https://host/x?access_token=abc&page=1", "https://host/x?page=1", {"abc"}),
        ("postgresql://me:p?w@host/db?sslmode=require", "postgresql://host/db?sslmode=require", {"p?w"}),
        ("mysql+pymysql://me:pw@host:3306/db", "mysql+pymysql://host:3306/db", {"pw"}),
        ("postgresql://host/db?user=me&password=pw", "postgresql://host/db?user=me", {"pw"}),
        ("me:pw@host:5000", "host:5000", {"pw"}),
        ("https:/me:S3CRET@h", "https:/h", {"S3CRET"}),
        ("https:/me:S3/CRET@h", "https:/h", {"S3/CRET", "CRET"}),
        ("https:///me:pw@h", "https:///h", {"pw"}),
        ("https:/token@h", "https:/h", {"token"}),
        ("//me:pw@h", "//h", {"pw"}),
        ("https//me:pw@h", "https//h", {"pw"}),
        ("postgresql:/me:pw@h/db", "postgresql:/h/db", {"pw"}),
        ("https://h;password=x", "https://h", {"x"}),
        ("https://h?pw=a&jwt=b&authorization=c&bearer=d&page=1", "https://h?page=1", {"a", "b", "c", "d"}),
        (
            "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BODBC%7D%3BUID%3Dme%3BPWD%3DS3CRET",
            "mssql+pyodbc:///",
            {
                "DRIVER%3D%7BODBC%7D%3BUID%3Dme%3BPWD%3DS3CRET",
                "DRIVER={ODBC};UID=me;PWD=S3CRET",
                "S3CRET",
            },
        ),
        ("https://me:${PW}@host?token=${T}", "https://me:${PW}@host?token=${T}", set()),
        ("http://host:5000/?a=b", "http://host:5000/?a=b", set()),
        ("sqlite:////tmp/a@b.db?timeout=60", "sqlite:////tmp/a@b.db?timeout=60", set()),
        ("file:///tmp/a:b@c", "file:///tmp/a:b@c", set()),
        ("databricks://profile", "databricks://profile", set()),
        ("runs/a@b", "runs/a@b", set()),
        ("C:/a", "C:/a", set()),
        ("//nas/a:b@c", "//nas/a:b@c", set()),
        ("sqlite:///runs/a@b/mlflow.db", "sqlite:///runs/a@b/mlflow.db", set()),
        (
            "docker://$oauthtoken@nvcr.io#nvidia/pytorch:24",
            "docker://$oauthtoken@nvcr.io#nvidia/pytorch:24",
            set(),
        ),
        ("https:/me:${PW}@host", "https:/me:${PW}@host", set()),
    ],
)
def test_a_uri_is_shown_without_its_secrets(uri: str, public: str, secrets: set[str]) -> None:
    assert without_password(uri) == public
    assert without_password(public) == public
    assert uri_secrets(uri) == secrets
    shown = hide_secrets(f"no store at {uri} here")
    assert (shown == f"no store at {uri} here") == (not secrets)
    assert not any(len(secret) > 5 and secret in shown for secret in secrets)


def test_references_are_filled_in_when_a_store_is_opened() -> None:
    assert with_references("https://me:${PW}@host/${NO}", variables={"PW": "a@b"}) == "https://me:a%40b@host/${NO}"


def test_variables_that_hold_secrets_are_hidden_by_name_or_value() -> None:
    secret = {
        "CHAT_URL": "https://hooks.slack.com/services/T0/B0/x1",
        "MLFLOW_TRACKING_PASSWORD": "a",
        "HF_TOKEN": "b",
        "WANDB_API_KEY": "c",
        "AWS_SECRET_ACCESS_KEY": "d",
        "HTTPS_PROXY": "http://me:pw@proxy:3128",
        "MLFLOW_TRACKING_URI": "https://me:pw@host",
    }
    plain = {
        "TOKENIZERS_PARALLELISM": "false",
        "NCCL_DEBUG": "INFO",
        "NCCL_IB_PKEY": "1",
        "MLFLOW_TRACKING_USERNAME": "me",
        "HTTP_PROXY": "http://proxy:3128",
    }
    assert public_variables(secret | plain) == dict.fromkeys(secret, "***") | plain


def test_texts_are_shown_without_what_looks_like_a_secret() -> None:
    shown = hide_secrets(
        "GET http://me:pw1@h:1/x?token=pw2&y=1 failed: pw3 {'HF_TOKEN': 'pw4', 'A': 1} export API_KEY=\"pw5\"; "
        "http://me:p/w6@h in 5 tokens: see step=1, HF_TOKEN=$HF_TOKEN",
        known={"pw3"},
    )
    assert shown == (
        "GET http://h:1/x?token=***&y=1 failed: *** {'HF_TOKEN': '***', 'A': 1} export API_KEY=\"***\"; "
        "http://h in 5 tokens: see step=1, HF_TOKEN=$HF_TOKEN"
    )


@pytest.mark.parametrize(
    "name",
    [
        *("MLFLOW_PW", "GITHUB_PAT", "AUTHORIZATION", "BLOB_SAS", "MY_JWT", "A_COOKIE", "GCP_CREDS", "BEARER"),
        "AZURE_STORAGE_CONNECTION_STRING",
    ],
)
def test_a_variable_is_secret_by_its_name(name: str) -> None:
    assert public_variables({name: "x"}) == {name: "***"}
    assert hide_secrets(f"export {name}=hunter2") == f"export {name}=***"


@pytest.mark.parametrize(
    "value",
    [
        "Authorization: Bearer X",
        "Basic X",
        "AccountName=a;AccountKey=X;EndpointSuffix=b",
        "Server=a;Pwd=X",
        "SharedAccessSignature=sv=1",
        "https:/me:pw@h",
        "-u me:pw",
    ],
)
def test_a_variable_is_secret_by_its_value(value: str) -> None:
    assert public_variables({"A": value}) == {"A": "***"}


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("export MLFLOW_PW=x", "export MLFLOW_PW=***"),
        ("export hf_token=x", "export hf_token=***"),
        ("export A=1;hf_token=x", "export A=***"),
        ("--export=ALL,my_pw=x", "--export=ALL,my_pw=***"),
        ("--export=my_pw=x", "--export=my_pw=***"),
        ("curl -u me:pw http://h", "curl -u me:*** http://h"),
        ("curl --user 'me:pw' h", "curl --user 'me:***' h"),
        ('curl -H "Authorization: Bearer x"', 'curl -H "Authorization: Bearer ***"'),
        ('curl -H "authorization: x"', 'curl -H "authorization: ***"'),
        ("got Basic bWU6cHc= here", "got Basic *** here"),
        ("a=1;AccountKey=x==;b", "a=1;AccountKey=***"),
        ("curl -d x 'https://hooks.slack.com/services/T0/B0/x1'", "curl -d x 'https://hooks.slack.com/services/***'"),
        (
            "post https://ptb.discord.com/api/v10/webhooks/1/x?wait=1",
            "post https://ptb.discord.com/api/v10/webhooks/***?wait=1",
        ),
        ("CHAT=https://discordapp.com/api/webhooks/1/x", "CHAT=https://discordapp.com/api/webhooks/***"),
        ("a.webhook.office.com/webhookb2/1@2/Incoming/x", "a.webhook.office.com/webhookb2/***"),
        ("https://api.telegram.org/bot1:x/sendMessage?chat_id=1", "https://api.telegram.org/bot***?chat_id=1"),
        ("https://chat.host:8065/hooks/3n9x1ypq7jyq8mwo1ngs1q6z9c", "https://chat.host:8065/hooks/***"),
        ("no store at https:/me:pw@h, https//me:pw@h", "no store at https:/h, https//h"),
        ("no store at '//me:pw@h' or me:pw@h", "no store at '//h' or h"),
    ],
)
def test_a_line_is_shown_without_its_secret(line: str, shown: str) -> None:
    assert hide_secrets(line) == shown
    assert hide_secrets(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "step 3: loss=2.1, key: value",
        "train demo --set data.tokenizer=bpe --set model.heads=4 model.key=4",
        "tokenizer=x key=value monkey=1 max_tokens=4 tokens_per_second=5 per_token=6 eos_token=a",
        "sorted(names, key=len)",
        "/data/a:b C:/a ~/x@y runs/a@b file:///tmp/a:b@c",
        "sqlite:///runs/a@b/mlflow.db",
        "http://host:5000",
        "git@github.com:me/x.git",
        "srun --container-image=docker://$oauthtoken@nvcr.io#nvidia/pytorch:24",
        "docker run -u 1000:1000 ubuntu:22.04@sha256:0123",
        "python -u train.py",
        "a basic test of the bearer",
        'curl -H "Authorization: Bearer $TOKEN" -u me:$PW h',
        "export hf_token=$(cat ~/token) my_pw=${PW}",
        'curl "$CHAT_URL" https://hooks.slack.com/services/$SLACK https://discord.com/api/webhooks/1/${PW}',
        "https://hooks.slack.com http://localhost:9000/hooks/deploy https://docs.host/webhooks/about",
        "/data/hooks/3n9x1ypq7jyq8mwo1ngs1q6z9c.git",
    ],
)
def test_a_harmless_text_stays(text: str) -> None:
    assert hide_secrets(text) == text


OVERRIDES = [
    "track.uri=https://me:hunter2@host/x",
    "slurm.env={HF_TOKEN: hunter2, HTTPS_PROXY: 'http://me:hunter2@proxy', A: 1}",
]


def test_the_written_run_has_no_secrets_and_the_value_has() -> None:
    config = load_run("demo", overrides=[*OVERRIDES, "slurm.setup=['export HF_TOKEN=hunter2', 'module load a']"])
    assert config.track.uri == "https://me:hunter2@host/x"
    assert config.slurm.env["HF_TOKEN"] == "hunter2"
    for text in (dump_run(config), json.dumps(config.model_dump(mode="json")), repr(config), str(config.slurm)):
        assert "hunter2" not in text
    assert config.model_dump(mode="json")["slurm"]["env"] == {"HF_TOKEN": "***", "HTTPS_PROXY": "***", "A": "1"}


def test_a_written_run_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_run(load_run("demo", overrides=OVERRIDES)))
    again = load_run(str(tmp_path / "config.yaml"))
    assert again.track.uri == "https://host/x"
    assert dump_run(again) == (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    "override",
    [
        "track=https://me:hunter2@host",
        "track.uri=[https://me:hunter2@host]",
        f"track.uri=[https://me:{'hunter2' * 40}@host]",
        "track.uri=[https://me:h/unter2@host]",
        "track.uri.x=https://me:hunter2@host",
        "track.uri={https://me:hunter2@host: 1}",
        "track.experiment=[https://host?token=hunter2]",
        "slurm.env.HF_TOKEN=[hunter2]",
        "slurm.env=[HF_TOKEN=hunter2]",
        "slurm.env.HF-TOKEN=hunter2",
        "evaluate.protocols=[https://me:hunter2@host]",
    ],
)
def test_a_refused_value_is_shown_without_its_secret(override: str) -> None:
    with pytest.raises(InputError) as refused:
        load_run("demo", overrides=[override])
    assert "unter2" not in str(refused.value)


def test_scripts_name_secrets_and_do_not_hold_them(tmp_path: Path) -> None:
    overrides = [*OVERRIDES, "slurm.env.WANDB_API_KEY=hunter2", "train.steps=50"]
    config = load_run("demo", overrides=overrides)
    scripts = render_scripts(config, run_file="demo", nodes=1, overrides=overrides, folder=tmp_path)
    for script in scripts.values():
        assert "hunter2" not in script
        assert "export A=1" in script
        for name in ("HF_TOKEN", "HTTPS_PROXY", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
            assert f"\n# {name} is a secret: it comes from the environment of sbatch.\n[[ -v {name} ]] ||" in script
    assert "train demo --set track.uri=https://host/x --set train.steps=50" in scripts["train"]
    for key, line in (("setup", "export HF_TOKEN=hunter2"), ("extra", "--export=ALL,HF_TOKEN=hunter2")):
        config = load_run("demo", overrides=[f"slurm.{key}=['{line}']"])
        with pytest.raises(InputError, match=rf"slurm.{key} contains a secret, .*HF_TOKEN=\*\*\*.*slurm.env"):
            render_scripts(config, run_file="demo", nodes=1, folder=tmp_path)
    config = load_run("demo", overrides=["slurm.setup=['export HF_TOKEN=$(cat ~/token)', 'export A_TOKEN=$B']"])
    assert "export HF_TOKEN=$(cat ~/token)\n" in render_scripts(config, run_file="d", nodes=1, folder=tmp_path)["train"]
