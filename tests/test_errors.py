"""The trainer and the launcher agree on the exit statuses."""

from jaxtrain import errors
from launch.host import exit_codes


def test_every_exit_status_of_the_trainer_is_the_same_in_the_launcher():
    statuses = {name: value for name, value in vars(errors).items() if name.isupper()}
    assert {"PREEMPTED", "REFUSED", "INTERRUPTED"} <= statuses.keys()
    assert statuses.items() <= vars(exit_codes).items()
