"""The words around a document and what is read from an answer: text, bytes and token ids.

Tokenizers come in here; no model, no tensor of a device but the grammar's tables.
"""
