// The options as a link, so that others see the same run: everything but the API key, in the address's fragment, which
// no server is sent.

const FIELDS = ["prompt", "system", "max-tokens", "temperature", "seed", "draft-tokens", "verification"];
const CHOICES = ["mode", "order"];
const SWITCHES = ["thrice", "thinking"];

/** The fragment that holds the form's options. */
export function fragment(form) {
  const values = FIELDS.map((id) => [id, form.querySelector(`#${id}`).value]);
  const chosen = CHOICES.map((name) => [name, form.querySelector(`[name="${name}"]:checked`).value]);
  const switched = SWITCHES.map((id) => [id, form.querySelector(`#${id}`).checked]);
  return `#${new URLSearchParams([...values, ...chosen, ...switched])}`;
}

/** Set the form as a fragment says; what it does not name, or names wrongly, stays. Returns whether it named anything. */
export function apply(form, text) {
  const given = new URLSearchParams(text.replace(/^#/, ""));
  for (const id of FIELDS) {
    const field = form.querySelector(`#${id}`);
    const known = field.tagName !== "SELECT" || [...field.options].some((option) => option.value === given.get(id));
    if (given.has(id) && known) field.value = given.get(id);
  }
  for (const name of CHOICES) {
    for (const input of form.querySelectorAll(`[name="${name}"]`)) {
      if (input.value === given.get(name)) input.checked = true;
    }
  }
  for (const id of SWITCHES) {
    if (given.has(id)) form.querySelector(`#${id}`).checked = given.get(id) === "true";
  }
  return FIELDS.some((id) => given.has(id));
}
