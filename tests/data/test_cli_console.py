from lavin_ds.cli import console


def test_without_a_terminal_progress_is_plain_lines_on_stderr(monkeypatch, capsys):
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0)
    with console.progress("counting") as update:
        update(1, 4)
        update(2)
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert first.startswith("counting: 1/4, ") and second.startswith("counting: 2/4, ")
    assert first.endswith("s left")


def test_frequent_updates_are_not_all_written(capsys):
    with console.progress("counting", 1000) as update:
        for done in range(1000):
            update(done)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(console, "err", console.Console(stderr=True, force_terminal=True))
    with console.progress("counting") as update:
        update(1, 2)
        update(2)
    written = capsys.readouterr().err
    assert "counting" in written and "\x1b[" in written and "counting: 1/2" not in written
