/** An error of a call. `message` and `hint` are sentences for people, `code` is for programs (docs/sql-api.md, "Errors"). */
export class AutotagError extends Error {
  override name = 'AutotagError'
  /** autotag's own code (`quota_exceeded`, `not_a_member`, …), or `network`, `timeout`, `refused`, `topic_in_use`, or PostgREST's code. */
  readonly code: string
  /** What to do about it; may be empty. */
  readonly hint: string
  /** Seconds after which the same call can succeed; null: unknown or never. */
  readonly retryAfter: number | null
  /** The data that the error came with: `images_left`, `renews_at`, … */
  readonly details: Readonly<Record<string, unknown>>

  constructor(code: string, message: string, hint = '', details: Record<string, unknown> = {}) {
    super(message)
    this.code = code
    this.hint = hint
    this.details = details
    this.retryAfter = typeof details['retry_after'] === 'number' ? details['retry_after'] : null
  }
}

export interface RestError { message: string, code?: string | null, hint?: string | null, details?: string | null }

/** PostgREST's error with autotag's code, which is in the JSON of `details`. */
export function fromRest(error: RestError, status?: number): AutotagError {
  let details: Record<string, unknown> = {}
  try {
    const parsed: unknown = JSON.parse(error.details ?? '')
    if (parsed && typeof parsed === 'object') details = parsed as Record<string, unknown>
  } catch { /* not autotag's: Postgres's details are a sentence */ }
  const code = typeof details['code'] === 'string' ? details['code'] : error.code || (status ? `http_${status}` : 'network')
  return new AutotagError(code, error.message, error.hint ?? '', details)
}
