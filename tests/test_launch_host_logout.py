import pytest

from launch.host.logout import ENDS, LINGER, SCOPE, STAYS, check_logout, choose_start

KILLS = "[Login]\nKillUserProcesses=no\nKillUserProcesses = yes\n"


@pytest.mark.parametrize(
    ("text", "says", "user", "lingers", "can_scope", "expected"),
    [
        ("[Login]\n#KillUserProcesses=yes\n", "", "u", False, False, STAYS),
        ("", "b false", "u", False, True, STAYS),
        (KILLS, "b false", "u", False, True, STAYS),  # logind knows what it was compiled with
        (KILLS, "", "root", False, False, STAYS),  # spared by default
        (KILLS + "KillExcludeUsers=v u", "", "u", False, False, STAYS),
        (KILLS + "KillOnlyUsers=v", "", "u", False, False, STAYS),
        (KILLS, "", "u", False, True, LINGER),  # the user's manager would end too
        ("", "b true", "u", False, True, LINGER),
        (KILLS, "", "u", True, True, SCOPE),  # lingering alone spares no session's processes
        (KILLS, "", "u", True, False, ENDS),
        (KILLS + "KillExcludeUsers=", "", "root", True, True, SCOPE),
    ],
)
def test_a_job_is_started_where_no_logout_ends_it(text, says, user, lingers, can_scope, expected):
    assert choose_start(text, says, user, lingers, can_scope) == expected


def test_this_machine_is_looked_at_without_an_error():
    assert check_logout() in (STAYS, SCOPE, LINGER, ENDS)
