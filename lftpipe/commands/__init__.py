"""The stages of the pipeline, one public function each, named like its command."""
