"""What a training run records about itself."""

from pipeline.tracking.runs import git_revision


def test_a_submitted_job_records_the_revision_it_was_sent_from(monkeypatch):
    monkeypatch.setenv("SLOTMATCH_REVISION", "abc123")
    assert git_revision() == "abc123"
