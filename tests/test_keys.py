"""Keys from settings and from a file: what is read, what is refused and in which words, never with a key in them."""

from __future__ import annotations

import hmac
import os
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.errors import SettingsError
from app.jobs.body import PRIORITY_LIMIT
from app.keys import ApiKey, Keyring, read_keys
from app.settings import SECRETS, Settings

KEY = "sk-0123456789abcdef"
OTHER = "sk-fedcba9876543210"
HEX = sha256(KEY.encode()).hexdigest()
RULE = "a key is 16 to 512 visible ASCII characters without spaces"


def named(ring: Keyring) -> dict[str, ApiKey]:
    return {key.name: key for key in ring.clients}


def written(folder: Path, text: str) -> Settings:
    (folder / "keys.toml").write_text(text, encoding="utf-8")
    return Settings(api_keys_file=str(folder / "keys.toml"))


def test_without_settings_there_are_no_keys() -> None:
    assert read_keys(Settings()) == Keyring()
    assert read_keys(Settings()).find(KEY.encode()) is None


def test_keys_of_the_setting_have_names_or_get_them() -> None:
    ring = read_keys(Settings(api_keys=f"alice={KEY}, {OTHER} ,c.d-e_f={KEY}=="))
    assert list(named(ring)) == ["alice", "key-2", "c.d-e_f"]
    for key, name in ((KEY, "alice"), (OTHER, "key-2"), (f"{KEY}==", "c.d-e_f")):
        found = ring.find(key.encode())
        assert found is not None and (found.name, found.models, found.weight) == (name, frozenset(), 1.0)


@pytest.mark.parametrize("token", [b"", KEY.encode()[:-1], f"{KEY} ".encode(), KEY.upper().encode(), b"\xff" * 70_000])
def test_what_is_not_a_key_finds_none(token: bytes) -> None:
    assert read_keys(Settings(api_keys=KEY, admin_key=OTHER)).find(token) is None


def test_every_digest_is_compared_whichever_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = read_keys(Settings(api_keys=f"{KEY},{KEY}2,{KEY}3", admin_key=OTHER))
    compared: list[bytes] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda mine, given: compared.append(mine) or real(mine, given))
    for token in (KEY, f"{KEY}2", OTHER, "wrong"):
        compared.clear()
        ring.find(token.encode())
        assert len(set(compared)) == 4


def test_a_file_gives_each_key_its_limits(tmp_path: Path) -> None:
    text = f"""
    [keys.alice]
    key = "{KEY}"
    weight = 3
    priority = 0
    models = ["tiny-text"]
    queue = 20
    [keys.bob]
    sha256 = "{sha256(OTHER.encode()).hexdigest().upper()}"
    """
    keys = named(read_keys(written(tmp_path, text)))
    digest = bytes.fromhex(HEX)
    assert keys["alice"] == ApiKey("alice", digest, 3.0, 0, frozenset({"tiny-text"}), 20.0)
    assert keys["bob"] == ApiKey("bob", sha256(OTHER.encode()).digest())


def test_the_setting_and_the_file_add_up(tmp_path: Path) -> None:
    settings = written(tmp_path, f'[keys.bob]\nkey = "{OTHER}"').model_copy(update={"api_keys": f"alice={KEY}"})
    assert list(named(read_keys(settings))) == ["alice", "bob"]


def test_the_admin_key_is_not_a_client() -> None:
    ring = read_keys(Settings(admin_key=KEY))
    assert ring.clients == () and ring.admin is not None
    assert ring.find(KEY.encode()) is ring.admin


def test_a_priority_is_one_that_a_request_may_name(tmp_path: Path) -> None:
    assert ApiKey("a").priority == PRIORITY_LIMIT
    for priority in (PRIORITY_LIMIT, -PRIORITY_LIMIT):
        read_keys(written(tmp_path, f'[keys.a]\nkey = "{KEY}"\npriority = {priority}'))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"api_keys": " "}, f"api_keys: entry 1: {RULE}"),
        ({"api_keys": f"{KEY},"}, f"api_keys: entry 2: {RULE}"),
        ({"api_keys": "alice=short"}, f"api_keys: entry 1: {RULE}"),
        ({"api_keys": f"{KEY}ä"}, f"api_keys: entry 1: {RULE}"),
        ({"api_keys": f"a={KEY} {KEY}"}, f"api_keys: entry 1: {RULE}"),
        ({"api_keys": "a=" + "k" * 513}, f"api_keys: entry 1: {RULE}"),
        ({"api_keys": f"{KEY}="}, f"api_keys: entry 1: {RULE}; one with "),
        ({"api_keys": f"my name={KEY}"}, "api_keys: entry 1: a name is 1 to 64 of A-Z a-z 0-9 . _ -"),
        ({"api_keys": f"={KEY}"}, "api_keys: entry 1: a name is 1 to 64 of"),
        ({"api_keys": f"a={KEY},b={KEY}"}, "api_keys: entry 2: the same key as that of a"),
        ({"api_keys": f"a={KEY},a={OTHER}"}, "api_keys: entry 2: the name a is taken"),
        ({"api_keys": f"{KEY},key-1={OTHER}"}, "api_keys: entry 2: the name key-1 is taken"),
        ({"admin_key": "secret"}, f"admin_key: {RULE}"),
        ({"admin_key": KEY, "api_keys": KEY}, "api_keys: entry 1: the same key as that of admin"),
        ({"admin_key": KEY, "api_keys": f"admin={OTHER}"}, "api_keys: entry 1: the name admin is taken"),
        ({"api_keys_file": "no/such.toml"}, "no/such.toml: No such file or directory"),
    ],
)
def test_a_bad_setting_is_named_and_its_key_is_not(fields: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_keys(Settings(**fields))
    assert caught.value.message.startswith(said) and caught.value.param in fields
    assert KEY not in caught.value.message and "k" * 20 not in caught.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "keys: Dictionary should have at least 1 item"),
        ("[keys]", "keys: Dictionary should have at least 1 item"),
        (f'[key.a]\nkey = "{KEY}"', "key: Input should be 'keys'"),
        ("[keys.a]", "keys.a: give either key or sha256"),
        (f'[keys.a]\nkey = "{KEY}"\nsha256 = "{HEX}"', "keys.a: give either key or sha256"),
        ('[keys.a]\nkey = "short"', f"keys.a: {RULE}"),
        ("[keys.a]\nkey = 1234567890123456", "keys.a.key: Input should be a valid string"),
        ('[keys.a]\nsha256 = "abc"', "keys.a.sha256: String should match"),
        (f'[keys.a]\nkey = "{KEY}"\nrate = 1', "keys.a.rate: Extra inputs are not permitted"),
        (f'[keys.a]\nkey = "{KEY}"\nweight = 0', "keys.a.weight: Input should be greater than"),
        (f'[keys.a]\nkey = "{KEY}"\nweight = nan', "keys.a.weight: Input should be"),
        (f'[keys.a]\nkey = "{KEY}"\nweight = true', "keys.a.weight: Input should be a valid number"),
        (f'[keys.a]\nkey = "{KEY}"\npriority = 11', "keys.a.priority: Input should be less than or equal to 10"),
        (f'[keys.a]\nkey = "{KEY}"\nqueue = 0', "keys.a.queue: Input should be greater than 0"),
        (f'[keys.a]\nkey = "{KEY}"\nmodels = []', "keys.a.models: List should have at least 1 item"),
        (f'[keys.a]\nkey = "{KEY}"\nmodels = "tiny-text"', "keys.a.models: Input should be a valid list"),
        (f'[keys."a b"]\nkey = "{KEY}"', "keys.a b: String should match"),
        (f'[keys.a]\nkey = "{KEY}"\n[keys.b]\nkey = "{KEY}"', "keys.b: the same key as that of a"),
        (f'[keys]\na = "{KEY}"', "keys.a: Input should be a valid dictionary"),
        (f"[keys.a]\nkey = {KEY}", "Invalid value (at line 2"),
        (f'[keys.a]\nkey = "{KEY}', "Unterminated string"),
    ],
)
def test_a_bad_file_is_named_with_its_field(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_keys(written(tmp_path, text))
    assert said in caught.value.message and caught.value.message.startswith(f"{tmp_path / 'keys.toml'}: ")
    assert KEY not in caught.value.message and HEX not in caught.value.message
    assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or not caught.value.__context__)


@pytest.mark.parametrize("text", [f"[keys.alice]\n{KEY} = 1", f"[keys.{KEY}]\nweight = 1", f'[keys]\n{KEY} = "alice"'])
def test_a_key_that_stands_where_a_name_belongs_is_not_told(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_keys(written(tmp_path, text))
    assert KEY not in caught.value.message and "..." in caught.value.message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    settings = written(tmp_path, "")
    (tmp_path / "keys.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"keys\.toml: not UTF-8"):
        read_keys(settings)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys.toml")
    with pytest.raises(SettingsError, match=r"keys\.toml: not a regular file"):
        read_keys(Settings(api_keys_file=str(tmp_path / "keys.toml")))


STRANGER = 4242
"""A user who is neither root nor the one who runs the tests."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


def secret(folder: Path, mode: int = 0o600) -> Settings:
    settings = written(folder, f'[keys.a]\nkey = "{KEY}"')
    (folder / "keys.toml").chmod(mode)
    return settings


def refused(settings: Settings) -> str:
    with pytest.raises(SettingsError) as caught:
        read_keys(settings)
    assert caught.value.param == "api_keys_file" and KEY not in caught.value.message
    assert "\n" not in caught.value.message and settings.api_keys_file in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o644, 0o444, 0o440])
def test_a_file_that_its_owner_alone_may_write(tmp_path: Path, mode: int) -> None:
    assert list(named(read_keys(secret(tmp_path, mode)))) == ["a"]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o664, 0o777])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    said = refused(secret(tmp_path, mode))
    assert f"others may write it (mode {mode:04o}): chmod go-w " in said


def test_a_folder_in_which_all_may_replace_the_file(tmp_path: Path) -> None:
    settings = secret(tmp_path)
    tmp_path.chmod(0o775)
    assert f"chmod go-w {tmp_path}" in refused(settings), "a group is others too"
    tmp_path.chmod(0o777)
    assert f"they may write into its folder: chmod go-w {tmp_path}" in refused(settings)
    tmp_path.chmod(0o1777)  # as /tmp: only its owner may replace a file
    assert read_keys(settings).clients


def test_a_link_counts_at_both_ends(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    secret(tmp_path / "there")
    link = tmp_path / "here" / "link.toml"
    link.symlink_to(tmp_path / "there" / "keys.toml")
    settings = Settings(api_keys_file=str(link))
    assert read_keys(settings).clients
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.chmod(0o777)
        assert f"chmod go-w {folder}" in refused(settings)
        folder.chmod(0o755)
    (tmp_path / "there" / "keys.toml").chmod(0o664)
    assert "others may write it" in refused(settings)


@as_root
def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = secret(tmp_path)
    os.chown(tmp_path / "keys.toml", STRANGER, 0)
    assert f"it belongs to user {STRANGER}" in refused(settings)
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert read_keys(settings).clients, "the server's own"
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER + 1)
    refused(settings)
    monkeypatch.setattr(os, "fstatvfs", lambda opened: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert read_keys(settings).clients, "as Docker mounts a secret that is a file of the host's user"


@as_root
def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = secret(tmp_path)
    os.chown(tmp_path, STRANGER, 0)
    assert f"its folder {tmp_path} belongs to user {STRANGER}" in refused(settings)
    monkeypatch.setattr(os, "fstatvfs", lambda opened: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert read_keys(settings).clients, "a folder of the host's user, mounted read-only"


def test_many_keys_and_a_number_of_thousands_of_digits(tmp_path: Path) -> None:
    entries = (f'[keys.client{n}]\nsha256 = "{n:064x}"\n' for n in range(12_000))
    assert len(read_keys(written(tmp_path, "".join(entries))).clients) == 12_000
    assert "digits" in refused(written(tmp_path, f'[keys.a]\nkey = "{KEY}"\nweight = {"9" * 5000}'))


@pytest.mark.parametrize("mode", [0o644, 0o440])
def test_a_secret_as_kubernetes_mounts_it(tmp_path: Path, mode: int) -> None:
    """A folder that all may write and that has the sticky bit, a hidden folder of this version, and links to it."""
    version = tmp_path / "..2026_11_29"
    version.mkdir(mode=0o755)
    secret(version, mode)
    (tmp_path / "..data").symlink_to(version.name)
    (tmp_path / "keys.toml").symlink_to("..data/keys.toml")
    tmp_path.chmod(0o3777)
    assert read_keys(Settings(api_keys_file=str(tmp_path / "keys.toml"))).clients


def test_neither_settings_nor_keys_print_a_key() -> None:
    settings = Settings(api_keys=f"alice={KEY}", admin_key=OTHER)
    shown = f"{settings!r} {settings} {read_keys(settings)!r}"
    assert KEY not in shown and OTHER not in shown and repr(bytes.fromhex(HEX)) not in shown
    assert {name for name, field in Settings.model_fields.items() if not field.repr} == set(SECRETS)
    public = settings.without_secrets()
    assert KEY not in public.model_dump_json() and OTHER not in public.model_dump_json()
    assert public.model_dump() == Settings().model_dump()


def test_a_bad_setting_beside_a_key_does_not_print_it() -> None:
    with pytest.raises(ValueError) as caught:
        Settings(api_keys=KEY, port=KEY)
    assert KEY not in str(caught.value)


def test_a_key_may_be_limited_to_loras(tmp_path: Path) -> None:
    text = f'[keys.alice]\nkey = "{KEY}"\nloras = ["ink", "wash"]\n[keys.bob]\nkey = "{OTHER}"\n'
    found = named(read_keys(written(tmp_path, text)))
    assert (found["alice"].loras, found["bob"].loras) == (frozenset({"ink", "wash"}), frozenset())
    with pytest.raises(SettingsError, match=r"keys\.alice\.loras"):
        read_keys(written(tmp_path, f'[keys.alice]\nkey = "{KEY}"\nloras = []\n'))
