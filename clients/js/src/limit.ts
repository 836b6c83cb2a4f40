import { AutotagError } from './errors.js'

/** ms after which a read-only request fails. Without a limit, a request that never ends would block all that wait for it. */
export const REQUEST_LIMIT = 30_000

/**
 * The result of `run`, or after `limit` ms an error with the code `timeout`. The signal aborts then, and so does a request that uses it.
 */
export async function within<T>(limit: number, who: string, run: (signal: AbortSignal) => PromiseLike<T>): Promise<T> {
  const control = new AbortController()
  let timer: ReturnType<typeof setTimeout> | undefined
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => {
      reject(new AutotagError('timeout', `${who} has not answered within ${limit / 1000} seconds.`, 'Try again.'))
      control.abort()
    }, limit)
  })
  try {
    return await Promise.race([run(control.signal), late])
  } finally {
    clearTimeout(timer)
  }
}

/** The answer to a query of supabase-js, within the limit. A signal that the query already has is kept. */
export async function answerTo<T>(query: PromiseLike<T>): Promise<T> {
  const builder = query as { signal?: AbortSignal, abortSignal?: (signal: AbortSignal) => unknown }
  return await within(REQUEST_LIMIT, 'The server', (signal) => {
    if (!builder.signal) builder.abortSignal?.(signal)
    return query
  })
}
