'use client'

import { useRouter } from 'next/navigation'
import { useState } from 'react'
import type { FormEvent } from 'react'
import { browserClient } from './supabase'

export function SignIn() {
  const [problem, setProblem] = useState('')
  const router = useRouter()

  async function signIn(event: FormEvent<HTMLFormElement>) {
    event.preventDefault()
    const form = new FormData(event.currentTarget)
    const { error } = await browserClient().auth.signInWithPassword({ email: String(form.get('email')), password: String(form.get('password')) })
    setProblem(error?.message ?? '')
    if (!error) router.refresh()
  }

  return (
    <form onSubmit={signIn}>
      <p role="alert">{problem}</p>
      <input name="email" type="email" aria-label="E-mail" required />
      <input name="password" type="password" aria-label="Password" required />
      <button>Sign in</button>
    </form>
  )
}
