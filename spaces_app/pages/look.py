"""How the pages look."""

import gradio as gr

# The conversation takes what the window leaves, so that the question is in sight on a phone too.
# Its last line in a turn, what the answer took, is no bubble and needs no buttons of its own.
CSS = """
#about h1, #about p, #state p {margin: 0}
#talk {height: calc(100dvh - 26.5rem) !important; min-height: 18rem}
#talk img {max-height: 12rem; width: auto}
#talk [aria-label=Share], #talk .message-buttons:has(.download-link) {display: none}
#talk .message-row {margin-block: 0.5rem 0.25rem}
#talk .message-row:first-child {margin-top: 2.25rem}
#talk .message-buttons + .bot-row:has(em:only-child) {margin-top: 0.25rem}
#talk .message-buttons + .bot-row:has(em:only-child) .message {
  background: none; border: none; box-shadow: none; padding: 0 0 0.5rem}
#talk .message-buttons + .bot-row:has(em:only-child) p {
  font-size: 0.8rem; line-height: 1.4; color: var(--body-text-color-subdued)}
#talk .message-buttons + .bot-row:has(em:only-child) em {font-style: normal; color: inherit}
#talk .message-buttons + .bot-row:has(em:only-child) + .message-buttons {display: none}
:focus-visible {outline: 2px solid var(--color-accent) !important; outline-offset: 1px}
@media (max-width: 640px) {#talk {height: calc(100dvh - 22rem) !important}}
"""
# Where CSS does not reach: gradio confines it to its own. The other page is the owner's.
HEAD = """<style>
body:has(#talk) .nav-holder {display: none}
@media (max-width: 640px) {.gradio-container > .main {padding: 0.75rem !important}}
</style>"""
# gradio 6.31 shows the pictures of a conversation without the text that they were given.
JS = """() => new MutationObserver(() => {
  for (const picture of document.querySelectorAll("#talk img[alt='']"))
    picture.alt = "The picture of this question";
}).observe(document.body, {childList: true, subtree: true})"""


def theme() -> gr.themes.Base:
    """Gradio's Soft with letters dark enough for WCAG AA, in fonts that need no download."""
    return gr.themes.Soft(font=("ui-sans-serif", "system-ui", "sans-serif")).set(
        background_fill_primary="*neutral_50",
        block_border_width="1px",
        block_label_text_color="*primary_700",
        block_title_text_color="*primary_700",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
        checkbox_label_background_fill_selected="*primary_600",
        checkbox_label_background_fill_selected_dark="*primary_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_300",
    )
