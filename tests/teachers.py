"""What the tests of teachers share."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lftpipe.teacher.source import Teacher

WORKSPACE = Path("unused")


def whole(teacher: Teacher) -> Any:
    return AutoModelForCausalLM.from_pretrained(teacher.folder, dtype=torch.float32).eval()
