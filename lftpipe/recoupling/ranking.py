"""Which block of layers to replace: a stated rule over the recoupling map.

Blocks of one length are ranked by the tie-credited ratio to two decimals, then by the relative gap to three,
then by the relative displacement. What lies below those digits is noise at the usual 8 batches of 256: not
rounded, one token in 2,048 that changes its partner would outweigh a displacement ten times as large.
docs/recoupling.md gives the reasons. Another figure may be asked for (`by`); the ratio breaks its ties.
"""

from lftpipe.base.errors import SettingsError
from lftpipe.config.settings import Predictor
from lftpipe.results.recoupling import Ranked, RecouplingMap

RATIO_DIGITS = 2
GAP_DIGITS = 3

#: What blocks can be ranked by, and the key of a map that has it.
PREDICTORS: dict[Predictor, str] = {
    "ratio": "ratio",
    "gap": "relative_gap",
    "displacement": "relative_displacement",
    "probe": "probe_residual",
    "influence": "influence",
}

Block = tuple[int, int]


def value(recoupling: RecouplingMap, name: str, block: Block) -> float | None:
    """One number of a pair of states from a map, None if the map has none.

    Parameters
    ----------
    recoupling
        A map.
    name
        Which figure of it.
    block
        Start and end.
    """
    layers = recoupling.layers
    matrix = getattr(recoupling, name)
    return None if matrix is None else matrix[layers.index(block[0])][layers.index(block[1])]


def _key(recoupling: RecouplingMap, block: Block, by: Predictor) -> tuple[float | int, ...]:
    ratio, gap, displacement = (
        value(recoupling, name, block) or 0.0 for name in ("ratio", "relative_gap", "relative_displacement")
    )
    if by != "ratio":
        return value(recoupling, PREDICTORS[by], block) or 0.0, ratio, block[0]
    return round(ratio, RATIO_DIGITS), round(gap, GAP_DIGITS), displacement, ratio, block[0]


def rank_blocks(recoupling: RecouplingMap, length: int, by: Predictor = "ratio") -> list[Block]:
    """All blocks `m:n` of `length` layers whose two states are on the map, the best first.

    Parameters
    ----------
    recoupling
        A map.
    length
        Layers of a block.
    by
        Which figure ranks.

    Raises
    ------
    SettingsError
        If the map does not have the figure to rank by.
    """
    if by != "ratio" and getattr(recoupling, PREDICTORS[by]) is None:
        raise SettingsError(
            f"--rank-by {by} and a map without {PREDICTORS[by]}",
            "a map that has it",
            f"run `lftpipe recouple --rank-by {by} --force`",
        )
    layers = recoupling.layers
    blocks = [(m, m + length) for m in layers if m + length in layers]
    return sorted(blocks, key=lambda block: _key(recoupling, block, by))


def block_length(num_layers: int, replace: float) -> int:
    """How many of the layers a fraction is: at least one.

    Parameters
    ----------
    num_layers
        Layers of the teacher.
    replace
        Fraction of them.
    """
    return min(max(1, round(replace * num_layers)), num_layers)


def best_block(recoupling: RecouplingMap, num_layers: int, replace: float, by: Predictor = "ratio") -> Block:
    """The best block that replaces a fraction of the teacher's layers.

    Parameters
    ----------
    recoupling
        A map.
    num_layers
        Layers of the teacher.
    replace
        Fraction of the layers to replace.
    by
        Which figure ranks.

    Raises
    ------
    SettingsError
        If no two states of the map are that far apart, or the map does not have the figure to rank by.
    """
    length = block_length(num_layers, replace)
    ranked = rank_blocks(recoupling, length, by)
    if not ranked:
        raise SettingsError(
            f"--replace {replace:g}, a block of {length} of {num_layers} layers",
            f"two states that far apart on the map of states {', '.join(map(str, recoupling.layers))}",
            "pass --block m:n with two of these, or extract and recouple more layers",
        )
    return ranked[0]


def ranking(recoupling: RecouplingMap, num_layers: int, by: Predictor = "ratio") -> list[Ranked]:
    """Every length's blocks, the best first.

    Parameters
    ----------
    recoupling
        A map.
    num_layers
        Layers of the teacher.
    by
        Which figure ranks.
    """
    lengths = {length: rank_blocks(recoupling, length, by) for length in range(1, num_layers + 1)}
    return [
        Ranked(length=length, fraction=length / num_layers, blocks=blocks)
        for length, blocks in lengths.items()
        if blocks
    ]
