"""What a trained checkpoint says of itself: its model card."""

from restpoint.train.options import TrainOptions
from restpoint.train.text import TrainingText


def model_card(options: TrainOptions, parameters: int, text: TrainingText, held_out: dict[int, float]) -> str:
    """A README in Markdown: sizes, training, and the held-out loss by the number of iterations."""
    tokens = options.steps * options.batch * options.sequence_length
    core = {
        "recurrent": f"iterated {options.mean_recurrence} times, s <- core(adapter[s, e])",
        "deq": f"solved to its fixed point, s = core(adapter[s, e]), to {options.solver_tolerance:g}",
    }[options.kind]
    if options.kind == "recurrent" and not options.fixed_recurrence:
        drawn = f"r = 1 + Poisson, its mean rising to {options.mean_recurrence} over the first {options.ramp:.0%}"
    else:
        drawn = "the solver's" if options.kind == "deq" else f"always {options.mean_recurrence}"
    rows = [
        ("kind", {"recurrent": "recurrent depth", "deq": "deep equilibrium"}[options.kind]),
        ("prelude / core / coda", f"{options.prelude_layers} / {options.core_layers} / {options.coda_layers} layers"),
        ("core", core),
        ("width / heads (KV) / feed-forward", f"{options.hidden_size} / {options.heads} ({options.key_value_heads}) / "
         f"{options.intermediate_size}"),
        ("parameters", f"{parameters / 1e6:.2f}M, bfloat16, tied embeddings"),
        ("text", f"{tokens / 1e6:.2f}M tokens ({tokens / text.sequences.numel():.2f} epochs), sequences of "
         f"{options.sequence_length}"),
        ("steps", f"{options.steps} of {options.batch} sequences, {options.precision} products"),
        ("iterations", f"{drawn}; gradients through the last {options.gradient_steps}" if options.kind == "recurrent"
         else "implicit gradients"),
        ("optimisers", f"Muon (matrices) and AdamW (embeddings, norms), peak rate {options.learning_rate:g}, warm-up "
         f"{options.warm_up:.0%}, linear fall to 0 over the last {options.decay:.0%}"),
    ]  # fmt: skip
    if options.start_embeddings:
        rows.append(("embeddings", "those of the tokenizer's model to begin with"))
    lines = ["# A language model that iterates one block", "", "Trained by `restpoint train-recurrent`.", "", "| | |"]
    lines += ["|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    lines += ["Held-out loss (nats per token), by the number of iterations:", ""]
    lines += ["| iterations | " + " | ".join(str(number) for number in held_out) + " |"]
    lines += ["|---" * (len(held_out) + 1) + "|"]
    lines += ["| loss | " + " | ".join(f"{loss:.3f}" for loss in held_out.values()) + " |", ""]
    return "\n".join(lines)
