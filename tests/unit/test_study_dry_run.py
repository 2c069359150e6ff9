"""`trainshort study --dry-run` refuses what the study would refuse before it trains."""

import shutil
from pathlib import Path

import pytest

from configs.study import load_study
from data_pipeline.counts import held_out_tokens
from data_pipeline.manifest import load_prepared
from tests.support.command_line import Call, refused
from tests.support.studies import write_study


@pytest.mark.usefixtures("folder")
def test_a_dry_run_refuses_what_a_study_refuses(trainshort: Call, prepared_once: Path) -> None:
    no_text = write_study(texts=["held-out", "no.txt"])
    assert refused(trainshort, "study", no_text, "--dry-run") == (
        "texts has no.txt, which is not a file: give one as for evaluate --data"
    )
    too_long = write_study(lengths=[32, 10**7])
    assert trainshort("study", too_long, "--dry-run").code == 0, "there is no text yet"
    shutil.copytree(prepared_once / "data", "data")
    tokens = held_out_tokens(load_prepared(load_study(too_long).runs[0].config.data, folder=Path("data")))
    assert refused(trainshort, "study", too_long, "--dry-run").startswith(
        f"lengths has 10000000, but the held-out text in data has {tokens} tokens: "
    )
