"""The student: the teacher with blocks of layers replaced by flow layers, as a transformers model.

Its class is made from the teacher's own: `student_class("llama")` registers `latent_flow_llama` with
transformers' Auto classes, which know model types only by registration.
"""

from lftpipe.student.derived import student_class
from lftpipe.student.flow_layer import FlowLayer

__all__ = ["FlowLayer", "student_class"]
