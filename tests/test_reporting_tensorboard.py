import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxtrain.reporting.tensorboard import EventFile

LOSS = "train/loss_nats"


def write_steps(workdir, first_step, steps, sign=1):
    events = EventFile(workdir, first_step)
    for step in steps:
        events.write(step, 1e9 + step, {LOSS: sign * step})
    events.close()


@pytest.mark.parametrize("resume_step", [0, 4])
def test_tensorboard_drops_the_steps_that_a_resumed_run_repeats(tmp_path, resume_step):
    write_steps(tmp_path, 0, range(0, 11))
    first_step = resume_step + 1 if resume_step else 0
    write_steps(tmp_path, first_step, range(resume_step + 1, 7), sign=-1)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars(LOSS)
    expected = list(range(first_step)) + [-step for step in range(resume_step + 1, 7)]
    assert [event.value for event in events] == np.float32(expected).tolist()
