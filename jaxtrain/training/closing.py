"""What a run prints after its last step: a sample, and the commands that come next."""

from jaxtrain.config.shell_commands import shell_command
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.training.sampling import complete, fit_positions, from_shell, shorten, shown

SAMPLE_FLAG = "--sample.prompt"
PROMPT_TOKENS = 64  # of held-out text, where sample.prompt is empty


def print_sample(loop, corpus):
    """Prints text from the trained weights, and how fast it came."""
    cfg = loop.cfg.sample
    if not cfg.tokens:
        return
    if corpus.tokenizer_name is None:
        loop.report.note("no sample: the shards do not name their tokenizer")
        return
    tokenizer = build_tokenizer(corpus.tokenizer_name)
    ids = loop.held_out.read(0, 1, 1 + PROMPT_TOKENS)
    if cfg.prompt:
        ids = tokenizer.encode(from_shell(cfg.prompt, SAMPLE_FLAG))
    prompt_tokens, tokens = fit_positions(loop.cfg.model, len(ids), cfg.tokens)
    if (prompt_tokens, tokens) != (len(ids), cfg.tokens):
        loop.report.note(
            f"the sample is {tokens} of sample.tokens={cfg.tokens} after {prompt_tokens} of "
            f"{len(ids)} prompt tokens: model.positions={loop.cfg.model.positions}"
        )
    if not tokens:
        return
    ids = ids[len(ids) - prompt_tokens :]
    with loop.measure.pause("sample"):
        [sample], tokens_per_s = complete(
            loop.run, loop.state, tokenizer, [ids], tokens, cfg.temperature, cfg.top_k
        )
    rule, prompt = "-" * 80, shorten(tokenizer.decode(ids))
    loop.report.note(f"sample, {tokens_per_s:,.0f} tokens/s; what follows the bar is the model's")
    loop.report.note(f"{rule}\n{shown(f'{prompt}|{sample.text}')}\n{rule}")


def next_commands(workdir):
    """Yields what to do with a run that has ended: a command a line, to paste."""
    run = f"--run={workdir}"
    yield "next:"
    yield f"  {shell_command('evaluate', run)}"
    yield f"  {shell_command('generate', run, '--samples=2')}"
    yield f"  {shell_command('summary', str(workdir))}"
