"""The data room: documents, conversations and preferences, read, cleaned and made ready to train on."""
