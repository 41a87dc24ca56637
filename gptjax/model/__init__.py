"""GPT-1, GPT-2 and GPT-3. Read spec.py (what a GPT is), plain.py (its forward pass as the papers write it), then gpt.py
(the module that is trained and sampled from), layers.py and attention/ (what it is made of). lstm.py is what they are
compared with; architecture.py takes either, by its config.

Shape suffixes. In the model, the objectives and generation, the name of an array ends in its axes, a letter each:
x_BTD is [batch, time, d_model], mask_BR [batch, response]. Names without a suffix are for any shape, or for the shape
that a docstring gives. An axis of a fixed size is written as that number (x_B1D, qkv_BT3D); in a shard_map, the letters
are those of the whole array.

    B  batch: rows, prompts, examples           V  vocabulary
    T  time: positions of a row, queries        L  layers
    S  positions that a query sees: keys,       C  positions of a chunk of the loss;
       or slots of the KV cache                    outputs of a classifier
    D  d_model                                  Q  slots of a prompt, padded on the left
    H  attention heads                          R  slots of a response, padded on the right
    K  d_head                                   N  completions of a prompt, sequences of an
    F  d_ff                                        example, beams
    M  micro-batches                            P  these as rows: B x N
    U  units of an LSTM                         E  width of an LSTM's embedding
"""
