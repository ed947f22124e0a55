// Sends images a few at a time, waits when the server is busy, and stops when it does not answer.

import { Busy, Failed, predict } from "./api.js";
import { describeError } from "./files.js";

const CONCURRENCY = 3; // the server batches what comes together, and others use it too

export class Queue {
  #waiting = [];
  #active = 0;
  #stopping = new AbortController();
  busyUntil = 0; // milliseconds, as of Date.now()
  isStopped = false;

  /** `onChange` is called when the `state` of a row changed, and with it `reason` or `prediction`. */
  constructor(onChange) {
    this.onChange = onChange;
  }

  get isRunning() {
    return this.#active > 0;
  }

  /** Send these rows after those that wait; when the queue is stopped they only keep their state. */
  add(rows) {
    if (!this.isStopped) this.#waiting.push(...rows);
    this.#run();
  }

  /** Abort what is on its way; those rows wait again. */
  stop() {
    this.isStopped = true;
    this.#waiting = [];
    this.#stopping.abort();
    this.#stopping = new AbortController();
  }

  #run() {
    while (this.#active < CONCURRENCY && this.#waiting.length) {
      const row = this.#waiting.shift();
      this.#active++;
      this.#send(row, this.#stopping.signal).finally(() => {
        this.#active--;
        this.#run();
        this.onChange(row);
      });
    }
  }

  async #send(row, signal) {
    row.state = "sending";
    this.onChange(row);
    try {
      const blob = await row.open();
      for (;;) {
        await pause(this.busyUntil - Date.now(), signal);
        try {
          row.prediction = await predict(blob, signal);
          break;
        } catch (error) {
          if (!(error instanceof Busy)) throw error;
          this.busyUntil = Date.now() + 1000 * error.seconds;
          this.onChange(row);
        }
      }
      [row.state, row.reason] = ["done", ""];
    } catch (error) {
      if (signal.aborted) {
        row.state = "waiting";
      } else if (error instanceof Failed) {
        [row.state, row.reason] = ["failed", error.message];
        if (error.message === "no answer from the server") this.stop();
      } else {
        [row.state, row.reason] = ["unusable", describeError(error)];
      }
    }
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    if (signal.aborted) reject(signal.reason);
    else if (milliseconds <= 0) resolve();
    else {
      const timer = setTimeout(resolve, milliseconds);
      signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
    }
  });
}
