import { AutotagError } from './errors.js'
import { REQUEST_LIMIT, within } from './limit.js'

/**
 * Makes of `fetch` a function to call at every change. It runs one fetch at a time: on a slow line, fetches that overtake or cancel each
 * other never end. What changes during a fetch goes into the next one, as does what a fetch that failed was for; null stands for everything.
 * A fetch that has not ended within `limit` ms has failed; its signal says so. The promise ends with the last fetch, or the first that fails;
 * after one that took too long, the next one begins at once if something has changed meanwhile.
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
