"""What a recipe of the reference's size costs on 1, 8 and 64 cards: arithmetic, printed as the tables of
docs/how_to/scaling.md.

    python -m benchmarks.cards

Source: of the sizes Phi-4-Multimodal (arXiv 2503.01743), of the speeds data sheets of the H100 SXM and of 400 Gb/s
networks.
"""

from __future__ import annotations

WIDTH, LAYERS, MLP_WIDTH, VOCABULARY = 3072, 32, 8192, 200_064
KEY_VALUE_WIDTH = 8 * 128
RANK = 256

TOKENS_PER_SAMPLE = 1000
SAMPLES_PER_STEP = 512
SAMPLES = 10**9

# bf16 without sparsity, and the share of it that training reaches; an assumption, as in docs/how_to/memory.md.
FLOPS, SHARE = 989e12, 0.40
# One direction, between cards of a machine and between machines, for each card.
NVLINK_BYTES, NETWORK_BYTES = 450e9, 50e9
CARDS_OF_A_MACHINE = 8
# Of a pack that fills a card.
TOKENS_PER_PACK = 8192

# Inputs and outputs of the linear layers of a layer.
LINEAR = [
    (WIDTH, WIDTH + 2 * KEY_VALUE_WIDTH),
    (WIDTH, WIDTH),
    (WIDTH, 2 * MLP_WIDTH),
    (MLP_WIDTH, WIDTH),
]
LINEAR_WEIGHTS = LAYERS * sum(inputs * outputs for inputs, outputs in LINEAR)
BACKBONE = LINEAR_WEIGHTS + VOCABULARY * WIDTH
ADAPTER = LAYERS * RANK * sum(inputs + outputs for inputs, outputs in LINEAR)
# Bits of a weight: nf4 has 4, an 8-bit scale for 64 weights, and a 32-bit one for 256 scales.
BITS = {"none": 16.0, "int8": 8.0, "nf4": 4 + 8 / 64 + 32 / (64 * 256)}


def backbone_gb(quantization: str) -> float:
    """The backbone in bf16, with its linear layers quantised."""
    return (LINEAR_WEIGHTS * BITS[quantization] / 8 + VOCABULARY * WIDTH * 2) / 1e9


def learned_gb(copies: int) -> float:
    """So many fp32 copies of an adapter."""
    return copies * ADAPTER * 4 / 1e9


def products_seconds(tokens: int) -> float:
    """What the products of so many tokens take on a card, with activation checkpointing."""
    return (6 * BACKBONE + 8 * ADAPTER) * tokens / (FLOPS * SHARE)


def step_seconds(cards: int) -> float:
    """What the products of a step take."""
    return products_seconds(TOKENS_PER_SAMPLE * SAMPLES_PER_STEP) / cards


def sharded_gb(cards: int) -> float:
    """The backbone in bf16 on one of the cards over which its layers lie; of several, with five layers whole."""
    whole = 5 / LAYERS if cards > 1 else 0
    return (LINEAR_WEIGHTS * (1 / cards + whole) + VOCABULARY * WIDTH) * 2 / 1e9


def gathered_gb(cards: int) -> float:
    """What a card receives for a pack: the other shards of every layer, forward and backward."""
    return 2 * (cards - 1) / cards * LINEAR_WEIGHTS * 2 / 1e9


def traffic_gb(cards: int) -> float:
    """What each card sends in a step: its adapter's gradients, in fp32, summed by a ring."""
    return 2 * (cards - 1) / cards * learned_gb(1)


def seconds_between(cards: int, gigabytes: float) -> float:
    """What each card takes to send or receive so much."""
    return gigabytes * 1e9 / (NVLINK_BYTES if cards <= CARDS_OF_A_MACHINE else NETWORK_BYTES)


def tables() -> str:
    """The tables of the page, in Markdown."""
    lines = ["| what a card holds | as stored (bf16) | int8 | nf4 |", "|---|---|---|---|"]
    backbone = {name: backbone_gb(name) for name in BITS}
    rows = {
        f"backbone, {BACKBONE / 1e9:.2f} billion weights": [backbone[name] for name in BITS],
        f"adapter, {ADAPTER / 1e6:.0f} million, with gradients and AdamW": [learned_gb(4)] * len(BITS),
        "together": [backbone[name] + learned_gb(4) for name in BITS],
    }
    lines += [f"| {what} | {' | '.join(f'{value:.1f} GB' for value in values)} |" for what, values in rows.items()]
    lines += [
        "",
        "| cards | products of a step | each card sends | which takes | share | 10^9 samples |",
        "|---|---|---|---|---|---|",
    ]
    for cards in (1, 8, 64):
        products, sent = step_seconds(cards), seconds_between(cards, traffic_gb(cards))
        days = (products + sent) * SAMPLES / SAMPLES_PER_STEP / 86_400
        lines.append(
            f"| {cards} | {products:.2f} s | {traffic_gb(cards):.2f} GB | {sent * 1000:.0f} ms | "
            f"{sent / (products + sent):.1%} | {days:,.0f} days |"
        )
    lines += [
        "",
        f"| cards | sharded backbone on a card | for {TOKENS_PER_PACK:,} tokens receives | which takes "
        "| their products |",
        "|---|---|---|---|---|",
    ]
    for cards in (1, 8, 64):
        received = seconds_between(cards, gathered_gb(cards))
        lines.append(
            f"| {cards} | {sharded_gb(cards):.1f} GB | {gathered_gb(cards):.1f} GB | {received * 1000:.0f} ms | "
            f"{products_seconds(TOKENS_PER_PACK) * 1000:.0f} ms |"
        )
    lines += ["", f"A saved state takes {learned_gb(3):.1f} GB, and the modality's folder {learned_gb(1):.1f} GB."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(tables(), end="")
