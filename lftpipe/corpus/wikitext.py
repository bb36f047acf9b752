"""The raw test split of WikiText-2 as one text, as tables of perplexity have it."""

from pathlib import Path

from lftpipe.base.errors import CorpusError, foreign

#: What `--corpus` calls it; a file of the split may follow.
NAME = "wikitext-2"


def wikitext_file(corpus: str | None) -> Path | str | None:
    """The file of `wikitext-2=FILE`; the bare name as it is, and None for any other corpus."""
    name, given, file = (corpus or "").partition("=")
    if name != NAME:
        return None
    return Path(file) if given else NAME


def read_wikitext(source: Path | str) -> str:
    """Its lines, blank ones empty, with two line ends between them: the form whose perplexity is published.

    Raises `CorpusError` if the file cannot be read, or the Hub does not serve the split.
    """
    if isinstance(source, Path):
        try:
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(
                f"{NAME}={source} ({error})", "its raw test split, wiki.test.raw", "name the file"
            ) from None
        return "\n\n".join(line if line.strip() else "" for line in lines)
    import datasets

    wanted, cure = "the Hugging Face Hub", f"check the network, or pass --corpus {NAME}=FILE"
    with foreign(CorpusError, f"corpus {NAME}", wanted, cure):
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
        return "\n\n".join(rows["text"])
