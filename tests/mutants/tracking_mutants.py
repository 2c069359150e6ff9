"""Mistakes that lose, repeat or misplace what MLflow is told, each with the test that must catch it."""

from tests.mutants.mutants import Mutant

SPOOL, REPLAY, EVENTS = (f"training/tracking/{name}.py" for name in ("spool", "replay", "events"))
OF_SPOOL, OF_REPLAY = "tests/unit/test_tracking_spool.py", "tests/unit/test_tracking_replay.py"
BY_KILLS = f"{OF_REPLAY}::test_lost_requests_and_kills_log_nothing_twice[0]"
BY_TURNS = f"{OF_REPLAY}::test_two_processes_that_send_in_turn_know_of_each_other"

TRACKING_MUTANTS = (
    Mutant(
        "spool: the tenth start comes before the second",
        SPOOL,
        'f"{start:06d}-{now}',
        'f"{start}-{now}',
        f"{OF_SPOOL}::test_files_are_in_the_order_of_the_starts",
    ),
    Mutant(
        "spool: a part of a line that a full disk left stays",
        SPOOL,
        "os.ftruncate(self._handle, self._size)",
        "pass",
        f"{OF_SPOOL}::test_a_full_disk_keeps_events_in_memory",
    ),
    Mutant(
        "spool: a file is removed while its writer appends",
        REPLAY,
        "            if not is_closed(file):\n                continue\n",
        "",
        BY_TURNS,
    ),
    Mutant(
        "spool: steps that another start has logged are logged again",
        REPLAY,
        "if step <= steps.get(key, -1):",
        "if step < steps.get(key, -1):",
        BY_TURNS,
    ),
    Mutant(
        "spool: what another process has logged is not asked for",
        REPLAY,
        "            self.run.refresh()\n",
        "            pass\n",
        BY_TURNS,
    ),
    Mutant(
        "spool: a lost answer's events are sent again",
        REPLAY,
        "return max(number, self.run.sent[1])",
        "return number",
        BY_KILLS,
    ),
    Mutant(
        "spool: a run below is made again after a lost answer",
        EVENTS,
        "    if known:\n",
        "    if known and not mark:\n",
        BY_KILLS,
    ),
    Mutant(
        "spool: events of two files have one mark",
        REPLAY,
        "return f\"{file.stem}:{event['n']}\"",
        "return f\"{event['n']}\"",
        BY_KILLS,
    ),
    Mutant(
        "spool: the first of several requests says that all have arrived",
        EVENTS,
        "tags=tags if is_last else []",
        "tags=tags if first == 0 else []",
        f"{OF_REPLAY}::test_only_the_last_request_says_that_all_have_arrived",
    ),
)
