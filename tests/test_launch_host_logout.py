import pytest

from launch.host.logout import ENDS, LINGER, SCOPE, STAYS, check_logout, choose_start

KILLS = "[Login]\nKillUserProcesses=no\nKillUserProcesses = yes\n"


@pytest.mark.parametrize(
    ("settings", "answer", "user", "lingers", "can_scope", "expected"),
    [
        ("[Login]\n#KillUserProcesses=yes\n", "", "u", False, False, STAYS),
        ("", "b false", "u", False, True, STAYS),
        (KILLS, "b false", "u", False, True, STAYS),  # logind's own answer overrides the files
        (KILLS, "", "root", False, False, STAYS),  # spared by default
        (KILLS + "KillExcludeUsers=v u", "", "u", False, False, STAYS),
        (KILLS + "KillOnlyUsers=v", "", "u", False, False, STAYS),
        (KILLS, "", "u", False, True, LINGER),  # the user's manager would end too
        ("", "b true", "u", False, True, LINGER),
        (KILLS, "", "u", True, True, SCOPE),  # lingering does not spare a session's processes
        (KILLS, "", "u", True, False, ENDS),
        (KILLS + "KillExcludeUsers=", "", "root", True, True, SCOPE),
    ],
)
def test_logind_settings_decide_how_a_supervisor_starts(
    settings, answer, user, lingers, can_scope, expected
):
    assert choose_start(settings, answer, user, lingers, can_scope) == expected


def test_the_logind_settings_of_this_machine_can_be_read():
    assert check_logout() in (STAYS, SCOPE, LINGER, ENDS)
