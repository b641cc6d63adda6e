"""Jobs on a real SLURM with two virtual nodes of two processes each."""

import pytest

from tests.golden.make import read_losses


@pytest.fixture(scope="module")
def unbroken(submit, tmp_path_factory):
    """A run that nothing happened to."""
    job = submit(tmp_path_factory.mktemp("unbroken") / "run")
    assert job.wait()["JobState"] == "COMPLETED", job.text()
    return job


def test_a_submitted_recipe_trains_to_the_end_on_two_nodes(unbroken):
    assert (unbroken.run_dir / "DONE").exists()
    assert len(read_losses(unbroken.run_dir)) == 12
    assert "0: step 12/12" in unbroken.text() and "vilg: the run is finished" in unbroken.text()
    for rank in range(4):
        assert (unbroken.run_dir / "logs" / f"rank_{rank}.log").exists()
    assert "step 12/12" in (unbroken.run_dir / "logs" / "rank_0.out").read_text()
