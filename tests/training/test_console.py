"""What is told of a run names its files as they are."""

from lavin_ds.training.console import TrainingConsole


def test_brackets_in_a_path_are_shown(capsys):
    console = TrainingConsole(enabled=True)
    for tell in (console.say, console.warn, console.error):
        tell("runs/[run]/[red]checkpoints is damaged")
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[-1] for line in shown] == ["runs/[run]/[red]checkpoints is damaged"] * 3
