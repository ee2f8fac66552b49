"""Training of drafters for any target (`gemma-mtp train`).

run                                 a whole run: data, training, the gate, export
material, written, examples         texts and held-out prompts, text the target writes, sequences and batches
unroll, attention, losses, step     drafts from every row, the losses, one step's gradient block by block
memory, optim, state, log, parallel what fits, optimisers, checkpoints, what is shown, several processes
drafter_trainer, gate, export       the loop, the measurement that decides, the files of a drafter
settings, shapes                    what a run is told, a new drafter's sizes and first weights
"""
