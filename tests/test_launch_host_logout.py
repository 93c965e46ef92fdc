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
        (KILLS, "", "u", True, True, SCOPE),  # lingering by itself spares no session's processes
        (KILLS, "", "u", True, False, ENDS),
        (KILLS + "KillExcludeUsers=", "", "root", True, True, SCOPE),
    ],
)
def test_logouts_rules_decide_how_a_supervisor_starts(
    settings, answer, user, lingers, can_scope, expected
):
    assert choose_start(settings, answer, user, lingers, can_scope) == expected


def test_this_machines_rules_can_be_read():
    assert check_logout() in (STAYS, SCOPE, LINGER, ENDS)
