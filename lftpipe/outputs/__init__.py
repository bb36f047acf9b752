"""What a command makes: staged beside its place and put there at once, replacing nothing of anyone else's.

Files are staged in a hidden folder `.NAME.making` beside the one that counts, the record. Its lock makes
one writer. When all of them are on the disk, they get their names, the record last: until then there is no
result, and what is there of it is no obstacle to the same command. What a killed process left is taken over
by the next one.
"""

from lftpipe.outputs.making import Staging, making, making_folder
from lftpipe.outputs.one_writer import LOCK, one_writer
from lftpipe.outputs.ownership import COMMENT, MARK, refuse_foreign_files, refuse_name

__all__ = [
    "COMMENT",
    "LOCK",
    "MARK",
    "Staging",
    "making",
    "making_folder",
    "one_writer",
    "refuse_foreign_files",
    "refuse_name",
]
