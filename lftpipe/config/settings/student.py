"""Settings of `export`, `generate`, `push` and `pull`."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from lftpipe.config.refusal import check_unicode
from lftpipe.config.settings.base import (
    CONFIG,
    MAIN,
    Common,
    Computing,
    CountOrZero,
    File,
    Form,
    Fraction,
    Names,
    OfStore,
    OnDevice,
    Role,
    Seeded,
    SolverName,
    Steps,
    Temperature,
    Text,
    WeightsDtype,
    Writing,
)

# --- Settings of the stages that make or use a student: `lftpipe export` and `generate`.


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ExportSettings(OfStore, Computing, Writing):
    """Of `lftpipe export`."""

    runs: Names = ()
    """Name or path of a run; several runs, whose blocks must not overlap, make one student."""
    k: Steps | None = None
    """Steps; default: those of training."""
    solver: SolverName | None = None
    """Solver; default: that of training."""
    form: Form = "latent-flow"
    """`latent-flow`: any student, with its own modelling file. `plain`: an ordinary checkpoint of the
    teacher's family, for students whose Euler steps are exactly layers."""
    dtype: WeightsDtype = "float32"
    """Number format of the weights."""
    out: File | None = None
    """The folder; default: `export-<form>-k<k>` in the first run's folder."""
    push_to_hub: Text | None = None
    """Also upload the folder to this repository of the Hugging Face Hub, ORG/NAME."""
    private: bool = False
    """Make a new repository private."""
    license: Text | None = None
    """The licence that the card names, such as apache-2.0; default: none is named."""

    PANELS: ClassVar[dict[str, str]] = {
        MAIN: "form k out dtype solver store workspace force",
        "On the Hub": "push_to_hub private license",
    }


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class GenerateSettings(OfStore, OnDevice, Seeded):
    """Of `lftpipe generate`."""

    target: Annotated[Text | None, Role.ARGUMENT] = None
    """Name or path of a run, or a folder in transformers' format; none with `--draft`."""
    prompt: Annotated[str, AfterValidator(check_unicode)] | None = None
    """The text to continue."""
    max_new_tokens: Annotated[int, Field(ge=1, le=2**24)] = 64
    """Tokens to write, at most."""
    k: Steps | None = None
    """Steps; default: those of training or export."""
    solver: SolverName | None = None
    """Solver; default: that of training or export."""
    temperature: Temperature = 0.0
    """0 always takes the most likely token; above 0, tokens are drawn."""
    top_k: CountOrZero = 0
    """Draw among so many most likely tokens only; 0: among all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the most likely tokens that together have this probability."""
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Make tokens that are there already less likely; 1: no."""
    compare: bool = False
    """Let the teacher continue the prompt too."""
    keep: bool = False
    """Keep both texts in the run's folder, for the report's page; implies `--compare`."""
    fused_with: Text | None = None
    """Another language model, of any tokenizer, that corrects each token: a run, a folder or a teacher."""
    weight: Fraction = 0.3
    """Of the other model, with `--with`: 0 is the first model alone."""
    draft: Text | None = None
    """A run whose student drafts for its teacher; the text is the teacher's greedy text."""

    PANELS: ClassVar[dict[str, str]] = {
        MAIN: "prompt max_new_tokens temperature seed k device store workspace",
        "Beside the teacher": "compare keep draft",
        "The next token": "top_k top_p repetition_penalty fused_with weight",
    }


# --- Settings of `lftpipe push` and `lftpipe pull`.


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class PushSettings(OfStore):
    """Of `lftpipe push`."""

    target: Annotated[Text | None, Role.ARGUMENT] = None
    """A store, a run by name or folder, or an exported folder."""
    repository: Annotated[Text | None, Role.ARGUMENT] = None
    """The repository, ORG/NAME: of data sets for a store, of models for the rest."""
    private: bool = False
    """Make a new repository private."""
    license: Text | None = None
    """The licence that the card names, such as apache-2.0; default: none is named."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "private license store workspace"}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class PullSettings(Common):
    """Of `lftpipe pull`."""

    source: Annotated[Text | None, Role.ARGUMENT] = None
    """`hf://ORG/NAME` for a run, `hf://datasets/ORG/NAME` for a store."""
    revision: Text | None = None
    """Branch, tag or commit; default: the repository's default branch."""
    run: Text | None = None
    """Name of the run; default: the repository's."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "revision run workspace"}
