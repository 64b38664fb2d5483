"""A server behind a faulty proxy, for what is asked of our own files and of Ray's."""

import pytest
from fault_proxy import PART

from pipeline import storage
from pipeline.storage import client as s3_client
from pipeline.storage import s3


@pytest.fixture
def proxy(faulty_s3, monkeypatch):
    """Without faults at first; waits are short, and parts and blocks are `PART` bytes."""
    monkeypatch.setattr(s3_client, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(s3_client, "WAIT_FACTOR", 1.0)
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    monkeypatch.setattr(storage, "_BLOCK", PART)
    monkeypatch.setenv("SLOTMATCH_S3_TIMEOUT", "1")
    faulty_s3.reset()
    yield faulty_s3
    faulty_s3.calm()
