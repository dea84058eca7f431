"""Settings: their sources, which values are refused, and that errors name the fix."""

from pathlib import Path

import pytest

from service import reference
from service.command_line import GROUPS, command_line, load_settings, mistaken_variables
from service.engine.policies import POLICIES
from service.settings import NOT_ON_THE_COMMAND_LINE, Settings, SettingsError, flag, variable
from tests.service.process import REPOSITORY


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


def test_defaults_are_safe() -> None:
    settings = load_settings([])
    assert settings.host == "127.0.0.1"
    assert settings.port == 8000
    assert settings.read_admin_token() is None


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXITSERVE_PORT", "9001")
    monkeypatch.setenv("EXITSERVE_MAX_PIXELS", "5000")
    monkeypatch.setenv("EXITSERVE_ACCESS_LOG", "off")
    settings = load_settings(["serve", "--port", "9002", "--bundle", "some/where"])
    assert (settings.port, settings.max_pixels, settings.access_log) == (9002, 5000, "off")
    assert settings.bundle == Path("some/where")
    assert load_settings(["--access-log", "json"]).access_log == "json"


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        load_settings(["--help"])
    assert exit_info.value.code == 0
    shown = " ".join(capsys.readouterr().out.split()).replace(
        "multiply- adds", "multiply-adds"
    )  # lines break within words
    for name, field in Settings.model_fields.items():
        assert variable(name) in shown
        assert field.description is not None
        assert field.description in shown
        offered = f" {flag(name)} " in shown or f" {flag(name)}, " in shown
        assert offered == (name not in NOT_ON_THE_COMMAND_LINE)
    for title in GROUPS:
        assert f" {title}: --" in shown
    assert "--precision {auto,fp32,int8}" in shown


@pytest.mark.parametrize(
    ("arguments", "field", "reason"),
    [
        (["--port", "99999"], "port", "65535"),
        (["--port", "http"], "port", "integer"),
        (["--budget-fraction", "1.5"], "budget_fraction", "less than or equal to 1"),
        (["--budget-fraction", "nan"], "budget_fraction", "less than or equal to 1"),
        (["--budget-mflops", "-3"], "budget_mflops", "greater than 0"),
        (["--burst-images", "0"], "burst_images", "greater than or equal to 1"),
        (["--max-batch-rows", "0"], "max_batch_rows", "greater than or equal to 1"),
        (["--log-level", "loud"], "log_level", "'debug'"),
        (["--drain-s", "0"], "drain_s", "greater than 0"),
        (["--budget-fraction", "0.4", "--budget-accuracy", "0.7"], "budget_accuracy", "give one of them"),
    ],
)
def test_an_error_names_the_setting_and_the_fix(arguments: list[str], field: str, reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(arguments)
    message = str(caught.value)
    assert flag(field) in message
    assert variable(field) in message
    assert reason in message


def test_all_errors_are_reported_together() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(["--port", "x", "--lanes", "-1"])
    assert "--port" in str(caught.value)
    assert "--lanes" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prot", "80"], "no option --prot: did you mean --port?"),
        (["--budget=40"], "--budget-accuracy or --budget-fraction or --budget-mflops?"),
        (["--nonsense"], "no option --nonsense: --help lists all options"),
        (["--port", "8080", "models/zoo/mine"], "--bundle models/zoo/mine"),
        (["clasify", "cat.png"], "'clasify' is neither a command (serve, classify, plan)"),
    ],
)
def test_unknown_options_are_refused_with_a_suggestion(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        load_settings(arguments)
    assert exit_info.value.code == 2
    assert told in capsys.readouterr().err


def test_misspelt_variables_are_reported_but_not_those_of_other_programs() -> None:
    others = ("EXITSERVE_DATA", "EXITSERVE_ZOO", "EXITSERVE_IMAGE", "EXITSERVE_ADDRESS", "EXITSERVE_MEMORY", "PROT")
    right = ("EXITSERVE_PORT", "EXITSERVE_ADMIN_TOKEN")
    assert not list(mistaken_variables(dict.fromkeys((*others, *right), "1")))
    (told,) = mistaken_variables({"EXITSERVE_BUDGET_FRACTON": "0.4", "EXITSERVE_PORT": "1"})
    assert "EXITSERVE_BUDGET_FRACTON is not a setting" in told
    assert "did you mean EXITSERVE_BUDGET_FRACTION?" in told


def test_the_token_is_no_option_and_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--admin-token " not in command_line().format_help()
    monkeypatch.setenv("EXITSERVE_ADMIN_TOKEN", "correct-horse-battery")
    settings = load_settings([])
    assert settings.read_admin_token() == "correct-horse-battery"
    assert "horse" not in repr(settings) + str(settings.model_dump())
    monkeypatch.setenv("EXITSERVE_ADMIN_TOKEN", "horse")
    with pytest.raises(SettingsError, match="at least 8") as caught:
        load_settings([])
    assert "horse" not in str(caught.value)


def test_the_token_may_be_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("correct-horse-battery\n")
    assert load_settings(["--admin-token-file", str(file)]).read_admin_token() == "correct-horse-battery"
    with pytest.raises(SettingsError, match="No such file"):
        load_settings(["--admin-token-file", str(tmp_path / "nowhere")]).read_admin_token()
    file.write_text("short")
    with pytest.raises(SettingsError, match="at least 8"):
        load_settings(["--admin-token-file", str(file)]).read_admin_token()
    monkeypatch.setenv("EXITSERVE_ADMIN_TOKEN", "correct-horse-battery")
    with pytest.raises(SettingsError, match="give one of them"):
        load_settings(["--admin-token-file", str(file)])


def test_the_page_of_settings_is_up_to_date_and_complete() -> None:
    assert [name for fields in GROUPS.values() for name in fields] == list(Settings.model_fields)
    written = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert written == reference.document(), "run `make configuration`"


def test_every_scheduling_policy_can_be_set_and_no_other():
    for policy in POLICIES:
        assert load_settings(["--scheduling-policy", policy]).scheduling_policy == policy
    with pytest.raises(SettingsError, match="no-compaction"):
        load_settings(["--scheduling-policy", "fastest"])
