import { AutotagError } from './errors.js'
import { REQUEST_LIMIT, within } from './limit.js'

/**
 * Wraps `fetch` in a function that you call at every change. It runs one fetch at a time, because on a slow connection, fetches that
 * overtake or cancel each other would never end. Ids that change during a fetch, and the ids of a failed fetch, are in the next one; null
 * means everything. A fetch that takes longer than `limit` ms fails, and its signal aborts. The promise ends with the last fetch, or with
 * the first that fails. After a fetch that took too long, the next one begins at once if something has changed meanwhile.
 */
export function oneAtATime<Id>(
  fetch: (assetIds: Id[] | null, signal: AbortSignal) => Promise<unknown>, limit = REQUEST_LIMIT,
): (assetIds: readonly Id[] | null) => Promise<void> {
  let changed: Set<Id> | null | undefined // undefined: nothing
  let running: Promise<void> | null = null

  function add(assetIds: Iterable<Id> | null): void {
    changed = assetIds && changed !== null ? new Set([...changed ?? [], ...assetIds]) : null
  }

  async function run(): Promise<void> {
    try {
      while (changed !== undefined) {
        const now: Set<Id> | null = changed
        changed = undefined
        await within(limit, 'The fetch', (signal) => fetch(now && [...now], signal)).catch((error: unknown) => {
          const goesOn = changed !== undefined && error instanceof AutotagError && error.code === 'timeout'
          add(now)
          if (!goesOn) throw error
        })
      }
    } finally {
      running = null
    }
  }

  return (assetIds) => {
    add(assetIds)
    return running ??= run()
  }
}
