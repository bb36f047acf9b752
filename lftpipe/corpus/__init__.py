"""Text: readers of corpora, and the packing of documents into token sequences. No torch."""
