"""Visual document retrieval with ColPali (arXiv:2407.01449): a page of a document is an image, a
query is text, and both are many vectors."""
