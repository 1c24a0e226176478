"""The papers' tables as this project quotes them."""

from lavin_ds.profiling import paper


def test_printed_totals_of_table_2_are_rounded_up():
    for _, printed, exact in paper.ABLATION.values():
        assert float(printed.rstrip("M")) == -(-exact // 100_000) / 10


def test_published_scores_have_a_figure_for_every_column():
    assert paper.score_row("LaVIN-7B")["Avg"] == 89.41
    assert all(len(row) == len(paper.SCORE_COLUMNS) for row in paper.SCORES.values())
