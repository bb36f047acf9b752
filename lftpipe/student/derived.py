"""Students' classes, made from the teacher's own when they are needed."""

from functools import lru_cache
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lftpipe.base.errors import TeacherError
from lftpipe.student.config import FIELDS, PREFIX, FlowLayout
from lftpipe.student.model import LatentFlow


@lru_cache
def student_class(model_type: str) -> Any:
    """The student's class for a teacher's model type, registered with transformers' Auto classes.

    Raises `TeacherError` if transformers has no causal language model of that type.
    """
    try:
        config_class: Any = CONFIG_MAPPING[model_type]
        teacher_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    except KeyError as error:
        raise TeacherError(
            f"a model of type {model_type}", "a causal language model of transformers", "choose another"
        ) from error
    name = f"LatentFlow{teacher_class.__name__}"
    fields = {key: value for key, (_, value) in FIELDS.items()}
    annotations = {key: kind for key, (kind, _) in FIELDS.items()}
    config: Any = type(
        f"LatentFlow{config_class.__name__}",
        (FlowLayout, config_class),
        {
            "model_type": PREFIX + model_type,
            "__annotations__": annotations,
            "__module__": __name__,
            **fields,
        },
    )
    kind: Any = type(
        name,
        (LatentFlow, teacher_class),
        {"config_class": config, "teacher_class": teacher_class, "__module__": __name__},
    )
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, kind, exist_ok=True)
    return kind
