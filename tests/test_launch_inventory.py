import re

import pytest

from launch.inventory import parse_inventory, read_inventory, read_toml

FIRST = '[[hosts]]\nname = "a"\naddress = "10.0.0.1"\n'
SECOND = '[[hosts]]\nname = "b"\naddress = "10.0.0.2"\n'
THIRD = '[[hosts]]\nname = "c"\naddress = "10.0.0.3"\n'


def test_a_hosts_own_values_override_the_defaults():
    text = f'[defaults]\nuser = "u"\nport = 22\n{FIRST}{SECOND}port = 23\n'
    assert [(h.name, h.user, h.port, h.target) for h in parse_inventory(text, "f").hosts] == [
        ("a", "u", 22, "a"),
        ("b", "u", 23, "b"),
    ]


def test_an_address_is_written_as_the_system_writes_it():
    text = FIRST.replace("10.0.0.1", "2001:DB8:0::1") + SECOND.replace("10.0", "::ffff:10.0")
    assert [h.address for h in parse_inventory(text, "f").hosts] == ["2001:db8::1", "10.0.0.2"]


@pytest.mark.parametrize("ssh", ["h0", "root@h0", "u@corp.example@h0", "fd00::1", "u@fd00::1", ""])
def test_a_destination_that_ssh_takes_is_accepted(ssh):
    assert parse_inventory(f'{FIRST}ssh = "{ssh}"', "f").hosts[0].target == (ssh or "a")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('adress = "10.0.0.3"', "Did you mean 'address'"),
        ('site = "mars"', "f:7: host 'b': site must be equal .* got 'mars', and '' for host 'a'"),
        ("gpus = 8", "f:7: host 'b': gpus must be equal on all hosts; got 8, and 0 for host 'a'"),
        ("'port' = 99999", "f:7: host 'b': port must"),
        (' "port" = 99999', "f:7: host 'b': port must"),
        ("port.a = 1", "f:7: host 'b': port must be an integer"),
        ("[hosts.port]", "f:7: host 'b': port must be an integer"),
        ("# \u2028 \u2029 \x85\nport = 99999", "f:8: host 'b': port must"),
        *(
            (f"{key} = {value}", f"f:7: host 'b': {key} must {message}")
            for key, value, message in (
                ("gpus", '"8"', "be an integer; got '8'"),
                ("gpus", "true", "be an integer; got True"),
                ("gpus", "-1", "be from 0 to 1024; got -1"),
                ("port", "-1", "be from 0 to 65535; got -1"),
                ("port", "99999", "be from 0 to 65535; got 99999"),
                ("ssh", '"-oProxyCommand=x"', "be a host name"),
                ("ssh", '"ssh://root@h0"', "be a host name or an alias .* not a URL"),
                ("ssh", '"h0 -p 23"', "be a host name"),
                ("ssh", '"h0:23"', "be a host name .* port belongs"),
                ("ssh", '"root@"', "be a host name"),
                ("ssh", '"@h0"', "be a host name"),
                ("ssh", '"root@-oProxyCommand=x"', "be a host name"),
                ("ssh", r'"h0\n"', r"contain visible .* not U\+000A \(a control character\)"),
                ("user", r'"\u202Eu"', r"contain visible .* U\+202E \(RIGHT-TO-LEFT OVERRIDE\)"),
                ("user", '"-u"', "be a user name"),
                ("interface", '"a name that is too long"', "be a name of at most 15"),
                ("chip", '"a 40"', "consist of ASCII letters"),
                ("workdir", '"jaxtrain"', "be an absolute path, or begin with ~/"),
                ("workdir", '""', "be an absolute path, or begin with ~/"),
                ("workdir", '"/a:b"', "be an absolute path, .* and have no colon"),
                ("python", '""', "be a program's name or path"),
                ("python", '" "', "be a program's name or path"),
                (
                    "python",
                    '"~u/python"',
                    "be a .*, of which only ~/ is expanded",
                ),
                ("site", "3", "be a string; got 3"),
            )
        ),
    ],
)
def test_an_invalid_key_is_refused_with_its_line_and_host(line, message):
    with pytest.raises(ValueError, match=message):
        parse_inventory(f"{FIRST}{SECOND}{line}\n", "f")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "a", "f:5: host 'a': each host's name must be unique; got 'a', which host 'a'"),
        ("name", "a b", "f:5: host 'a b': name must begin with a letter or digit and consist of"),
        ("name", "\u05d0", r"f:5: host '\\u05d0': name must begin with a letter"),
        ("name", "", "f:5: host number 2: name must begin with a letter or digit"),
        ("address", "10.0.0.1", "f:6: host 'b': each host's address must be unique"),
        ("address", "::ffff:10.0.0.1", "must be unique; got '10.0.0.1', which host 'a' has"),
        ("address", "here", "f:6: host 'b': address must be an IP address; got 'here'"),
        ("address", "127.0.0.1", "f:6: host 'b': address must be reachable from the other"),
        ("address", "::1", "reachable from the other"),
        ("address", "0.0.0.0", "must be the IP address of one host"),
        ("address", "224.0.0.1", "must be the IP address of one host"),
        ("address", "255.255.255.255", "must be the IP address of one host"),
        ("address", "fe80::1", "valid on every link"),
        ("address", "fd00::1%eth0", "valid on every link"),
    ],
)
def test_an_invalid_name_or_address_is_refused(key, value, message):
    text = FIRST + re.sub(f'{key} = ".*"', lambda _: f'{key} = "{value}"', SECOND)
    with pytest.raises(ValueError, match=message):
        parse_inventory(text, "f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f: hosts must be listed"),
        ('\nhosts = ["h0"]', "f:2: each host must be a table"),
        ("hosts = 3", "f:1: hosts must be listed"),
        (f"defaults = 3\n{FIRST}", "f:1: defaults must be a table"),
        ('hosts = [\n{name="a"}]', "f:1: host 'a' must have address"),
        (f"[defaults]\nprot = 22\n{FIRST}", "f:2: defaults: no key 'prot'. Did you mean 'port'"),
        (f'[defaults]\nport = "22"\n{FIRST}', "f:2: defaults: port must be an integer"),
        (f'[defaults]\nport = "22"\n{FIRST}port = 22', "f:2: defaults: port must be an integer"),
        (f"['defaults']\nport = 99999\n{FIRST}", "f:2: defaults: port must be from"),
        (f"defaults.port = 99999\n{FIRST}", "f:1: defaults: port must be from"),
        (f"defaults = {{port = 99999}}\n{FIRST}", "f:1: defaults: port must be from"),
        (f'[["hosts"]]\n{FIRST[10:]}{SECOND}gpus = 8', "f:7: host 'b': gpus must be equal"),
        (f"{FIRST}gpus = 1\n{SECOND}{THIRD}", "f:4: host 'a': gpus must .* 0 for host 'b'"),
        (f'ranks = "gpu"\n{FIRST}', "f:2: host 'a': gpus must be at least 1 if ranks is"),
        (f'ranks = "node"\n{FIRST}', 'f:1: ranks must be "host" or "gpu"; got .node'),
        (f"ranks = 3\n{FIRST}", 'f:1: ranks must be "host" or "gpu"; got 3'),
        (f"host = 3\n{FIRST}", "f:1: no key 'host'"),
        (f'{FIRST}ssh = "u@h"\nuser = "v"', "f:4: host 'a': the user must be given once"),
        ("hosts = [", "f: "),
        (f"a = {'[' * 5_000}", "f: its brackets are nested too deeply"),
        (f"a = {'9' * 5_000}", "f: "),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_line(text, message):
    with pytest.raises(ValueError, match=message):
        parse_inventory(text, "f")


def test_a_path_that_is_no_text_file_is_refused_by_its_flag(tmp_path):
    (tmp_path / "latin1.toml").write_bytes(b"# \xe9")
    for name, reason in (("", "directory"), ("no.toml", "No such"), ("latin1.toml", "UTF-8")):
        with pytest.raises(ValueError, match=f"--hosts must .*{reason}"):
            read_inventory(tmp_path / name)
        with pytest.raises(ValueError, match=f"--prices must .*{reason}"):
            read_toml(tmp_path / name, "--prices")


def test_there_is_one_rank_per_host_or_per_gpu():
    text = f"[defaults]\ngpus = 4\n{FIRST}{SECOND}"
    assert parse_inventory(text, "f").ranks_per_host == 1
    assert parse_inventory(f'ranks = "gpu"\n{text}', "f").ranks_per_host == 4


def test_a_byte_order_mark_before_the_first_line_is_ignored(tmp_path):
    (tmp_path / "hosts.toml").write_text(FIRST, encoding="utf-8-sig")
    assert read_inventory(tmp_path / "hosts.toml").hosts[0].name == "a"
