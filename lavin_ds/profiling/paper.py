"""Published costs and scores. Each figure is written here once, with its source.

"Paper 1" is LaVIN as published at NeurIPS 2023 (arXiv 2305.15023). "Paper 2" is its extended version. "README" is that
of luogen1996/LaVIN at commit f703a3a.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

SCORE_COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")


@dataclass(frozen=True)
class CostRow:
    """A row of a published cost table, as printed ("-" where the table has a dash)."""

    method: str
    trainable: str
    memory: str  # of one GPU; the papers write G, which may be GB or GiB
    time: str
    storage: str
    source: str

    def as_dict(self) -> dict:
        return asdict(self)


_TABLE = "paper 1, Table 4 = paper 2, Table 6; 8 A100"

COST_TABLE = (
    CostRow("BLIP-2", "188M", "-", ">200 hours", "-", _TABLE),
    CostRow("LLaVA", "13B", "OOM", "N/A", "N/A", _TABLE),
    CostRow("LLaVA, memory saving", "13B", "36.8G", "7 hours", "26GB", _TABLE),
    CostRow("LaVIN-7B", "3.8M", "33.9G", "1.4 hours", "15M", _TABLE),
    CostRow("LaVIN-13B", "5.4M", "55.9G", "2 hours", "20M", _TABLE),
)

_MODEL_ZOO = "README, model zoo; 4-bit base, one GPU (a 3090, says its news section)"

LITE_TABLE = (
    CostRow("LaVIN-7B-lite", "3.8M", "9G", "29 hours", "-", _MODEL_ZOO),
    CostRow("LaVIN-13B-lite", "5.4M", "14G", "42 hours", "-", _MODEL_ZOO),
)

# Contradictions between the sources or within one.
DISAGREEMENTS = (
    "Tables 4 and 6 agree in every figure. Both texts say that LaVIN saves more than 40% of LLaVA's GPU memory, "
    "but 33.9G is 8% below 36.8G, and 55.9G above it.",
    "The papers time 8 A100; the authors' 7B script and README use 2.",
    "README gives LaVIN-13B on 8 A100 2 hours (90.54) and, in another row, 4 hours (90.8).",
    "README gives LaVIN-13B-lite 14G in the model zoo and 15G in its news section.",
    "#Storage 15M and 20M count only the adapters (15.1 and 21.6 MB in fp32). The files that the authors' code "
    "saves also hold the optimizer state and are about three times as large.",
)

# Paper 1, Table 1 (the same in paper 2): accuracy in percent on ScienceQA test.
SCORES = {
    "LaVIN-7B": (89.25, 94.94, 85.24, 88.51, 87.46, 88.08, 90.16, 88.07, 89.41),
    "LaVIN-13B": (90.32, 94.38, 87.73, 89.44, 87.65, 90.31, 91.19, 89.26, 90.50),
    "LaVIN-13B, 40 epochs": (89.88, 94.49, 89.82, 88.95, 87.61, 91.85, 91.45, 89.72, 90.83),
}

# Paper 1, Table 2: the row, #T-Params as printed (rounded up), and the exact number of trainable parameters.
ABLATION = {
    "ablation-text": ("Text Only", "1.8M", 1_704_192),
    "ablation-vision": ("+ Vision Modality (MMT)", "2.4M", 2_331_008),
    "ablation-joint": ("+ Joint Opt. (MMT)", "2.5M", 2_450_912),
    "ablation-vitl": ("+ Stronger Image Enc.", "2.9M", 2_855_536),
    "lavin-7b": ("+ MM-Adapter", "3.8M", 3_781_296),
    "lavin-13b": ("+ Larger LLM (13B)", "5.4M", 5_390_080),
}


def score_row(name: str) -> dict[str, float]:
    """A row of paper 1's Table 1 by column."""
    return dict(zip(SCORE_COLUMNS, SCORES[name], strict=True))
