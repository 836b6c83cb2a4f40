import type { QueryClient } from '@tanstack/react-query'
import { useEffect, useMemo } from 'react'

export interface Shareable { start(): void, stop(): void }

const all = new WeakMap<QueryClient, Map<string, Shareable>>()
const users = new WeakMap<Shareable, number>()

/** One object for all components with the same name; it runs while one of them is on the page. */
export function useShared<T extends Shareable>(client: QueryClient, name: string, make: () => T): T {
  // eslint-disable-next-line react-hooks/exhaustive-deps
  const shared = useMemo(() => {
    const own = all.get(client) ?? new Map<string, Shareable>()
    all.set(client, own)
    const found = (own.get(name) as T | undefined) ?? make()
    own.set(name, found)
    return found
  }, [client, name])
  useEffect(() => {
    const own = all.get(client)!
    own.set(name, shared)
    const count = (users.get(shared) ?? 0) + 1
    users.set(shared, count)
    if (count === 1) shared.start()
    return () => {
      const left = users.get(shared)! - 1
      users.set(shared, left)
      if (left) return
      shared.stop()
      own.delete(name)
    }
  }, [client, name, shared])
  return shared
}

/** Runs one at a time. Calls during a run cause one more run after it. */
export function coalesce(run: () => Promise<unknown>): () => Promise<void> {
  let running = false
  let again = false
  return async () => {
    again = true
    if (running) return
    running = true
    try {
      while (again) {
        again = false
        await run()
      }
    } finally {
      running = false
    }
  }
}
