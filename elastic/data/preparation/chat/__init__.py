"""Conversations to learn from: as people keep them, as a model's template writes them, and what of that counts.

conversations.py  a row becomes turns, or what is wrong with it
template.py       turns become text, by the model's own template in a sandbox, and where in it assistants speak
encoder.py        text becomes tokens, and which of them count
preparing.py      what `prepare` asks of all that
"""
