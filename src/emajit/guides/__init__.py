"""Guides to topics that have no module of their own.

- `emajit.guides.teachers`: target networks, teachers, ensembles, BatchNorm statistics.
- `emajit.guides.low_precision`: averages of bfloat16 and float16 weights.
- `emajit.guides.compiled_steps`: the average inside your `torch.compile`, and what emajit compiles.
- `emajit.guides.sharding`: FSDP, tensor parallel, DDP, and ZeRO.
"""
