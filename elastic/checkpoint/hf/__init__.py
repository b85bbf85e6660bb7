"""Models of Hugging Face: start a run from one, and give one away. No torch here, and never a pickle.

families/    which `model_type` is which `Config`, and how its tensors are called; one file each
folder.py    what a folder of `config.json` and safetensors holds, checked before a byte of it is used
numbers.py   fp16, bf16 and fp32, as bytes
importing.py a folder becomes the checkpoint of step 0 of a run
adapters.py  low-rank adapters as PEFT keeps them
exporting.py a checkpoint becomes a folder
"""
