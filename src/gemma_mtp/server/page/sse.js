// Server-sent events read from a fetch, as https://html.spec.whatwg.org/multipage/server-sent-events.html has them.

/** Text in, in pieces cut anywhere; out comes the data of each event that is complete. Other fields are ignored. */
export class EventParser {
  #rest = "";
  #data = [];
  #afterReturn = false; // a \n that comes next belongs to the \r before it

  *push(text) {
    if (text === "") return;
    const own = this.#afterReturn && text.startsWith("\n") ? text.slice(1) : text;
    this.#afterReturn = text.endsWith("\r");
    const lines = (this.#rest + own).split(/\r\n|\n|\r/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) yield this.#data.join("\n");
        this.#data = [];
      } else if (line === "data" || line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
  }
}

/** The data of each event of a ReadableStream of bytes. Leaving early cancels the stream. */
export async function* eventData(body) {
  const parser = new EventParser();
  const decoder = new TextDecoder();
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
